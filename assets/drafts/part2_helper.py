# What only Part II needs: the loop of section 5 with the loss and the batches to choose


def rate(step, steps):
    """Learning rate: rises in 20 steps, falls in the last 0.4."""
    return 4e-3 * min(1, (step + 1) / 20, (steps - step) / (.4 * steps))


@torch.no_grad()
def follow(average, net, step):
    """Move the average of the weights; its half-life is a twentieth of the steps so far."""
    share = 1 - .5 ** (1 / max(1, .05 * step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)


def train(net, steps, seed=0, loss=None, batches=data, **settings):
    """Train; the average of the weights. loss(net, images, labels, step) replaces LEGO's."""
    average = copy.deepcopy(net).requires_grad_(False)
    optimizers = train_tiny.make_optimizers(net, 4e-3)
    for step in range(steps):
        images, y = batches.batch(seed=seed, step=step, count=32)
        with autocast():
            total = loss(net, images, y, step) if loss else edm.loss(
                net, images, y, label_drop=.1, generator=generator(seed, step), **settings)[0]
        total.backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate(step, steps)
            optimizer.step(), optimizer.zero_grad()
        follow(average, net, step)
    return average


edm.sampler = "heun"            # This part was made for it: ReCAP uses both evaluations of a step.
