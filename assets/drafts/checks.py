# For every row of Part II a check that a stub fails, on the names that the cells define. These
# lines belong at the end of RUN_CELLS in test_lego.py.

# T-Stitch: every evaluation of a step comes from the network of the plan (Heun's method has two),
# and the ends are known.
asked, hooks = [], []
for net in (model, little):
    hook = lambda net, inputs: asked.append((net, float(inputs[1][0])))
    hooks.append(net.register_forward_pre_hook(hook))
plan = stitch(.4, (little, ()), list(range(STEPS)))
walked(plan, 0, 2, "heun")
for hook in hooks:
    hook.remove()
for (net, c_noise), (step, sigma) in zip(asked, edm.evaluations(STEPS, "heun"), strict=True):
    assert net is plan(step)[0] and math.isclose(c_noise, math.log(sigma) / 4, abs_tol=1e-5)
assert {net for net, _ in asked} == {model, little}
part, apart = smalls["part of the stack"]
for rho, skip in ((0, ()), (1, others)):
    stitched_images, direct = walked(stitch(rho, part, apart), 0, n=2), draw(model, 0, 2, skip=skip)
    assert torch.allclose(stitched_images, direct, atol=1e-3)
# The threshold of its verdict: a loss of a tenth passes, one of a fifth does not.
def fake(early):
    alone = np.array([[20., 20., 0.], [21, 21, 0]]) - 10
    for key, rise in (((1, True), 1), ((.4, True), early), ((.4, False), .9)):
        stitched["fake", *key] = d_whole[:2] + rise * alone
    return verdict_of(*stitch_claims("fake", shape=SHAPE))
whole_stack, d_whole = d_whole, d_whole[:2]
assert fake(.05) == "supported" and fake(.2).startswith("not supported")
assert "since it was not seen" in verdict_of({"a": (1., .1)}, {"b": (.1, .2)})
assert verdict_of({"a": (.1, .2)}).startswith("not testable")
assert verdict_of({"a": (.1, .2, .5)}).startswith("not supported")
d_whole = whole_stack

# Diffusion Classifier: labels share their noise, the control keeps sigma, elimination agrees.
some, every = data.held(4)[0], torch.arange(CLASSES).repeat(4, 1)
same = errors(tied(model), some, every, [0])
own = errors(tied(model), some, every, [0], shared=False)
assert torch.equal(same, same[:, :1].expand(-1, CLASSES))
assert not torch.equal(own, own[:, :1].expand(-1, CLASSES))
sigma = edm.sigma_at(torch.rand(4, generator=generator("classify", 0)))
seen_sigmas, before = [], EDM.loss
def spy(self, *inputs, sigma, **settings):
    seen_sigmas.append(sigma)
    return before(self, *inputs, sigma=sigma, **settings)
EDM.loss = spy
errors(model, some, every, [0], shared=False)
EDM.loss = before
assert len(seen_sigmas) == CLASSES and all(torch.equal(one, sigma) for one in seen_sigmas)
total = sum(draws for draws, _ in ROUNDS)
patient = errors(model, some, every, range(total)).argmin(1)
assert float((classify(model, some) == patient).float().mean()) >= .75

# PPGN: e1 = 0 hears nothing of the denoiser, and raises the guide's confidence all the same.
x, x0_hat = 3 * torch.randn(8, 3, SIDE, SIDE), data.held(8)[0]
wish = towards(by_kind)
deaf, hears = plug_in(wish, 0, 30.), plug_in(wish, 1, 30.)
assert torch.equal(deaf(x0_hat, x, 1.), deaf(-x0_hat, x, 1.))
assert not torch.equal(hears(x0_hat, x, 1.), hears(-x0_hat, x, 1.))
assert torch.allclose(plug_in(wish, 1, 0.)(x0_hat, x, 1.), x0_hat, atol=1e-5)
y = .3 * torch.randn(8, 3, SIDE, SIDE)
for e1 in (0, 1):
    step = plug_in(wish, e1, 1.)(x0_hat, y, 1.)
    assert wish(step.clamp(-1, 1)) > wish((x0_hat if e1 else y).clamp(-1, 1))

# PPAP: an expert learns its range (a few lessons are enough for that), and the wrong one is worse.
clean = teach(Judge(), brightest, steps=60)
made = data.held(64)[0]
pair = [learn(clean, adapted(clean, 1), *edges, 60, 0) for edges in (EDGES[:2], EDGES[-2:])]
def kl_of(net, edges):
    said = says(net, *lesson(generator("check"), made, *edges))
    return float(kl_div(said, clean(made).log_softmax(1), reduction="batchmean", log_target=True))
for right, wrong, edges in ((*pair, EDGES[:2]), (*pair[::-1], EDGES[-2:])):
    assert kl_of(right, edges) < .9 * min(kl_of(wrong, edges), kl_of(clean, edges))
assert [in_range(range(RANGES))(sigma) for sigma in middles] == list(range(RANGES))
for name, w in clean.state_dict().items():          # the classifier is frozen
    layer, kind = name.split(".")
    kept = pair[0].state_dict()
    assert torch.equal(w, kept.get(name, kept.get(f"{layer}.parametrizations.{kind}.original")))

# LiT: the formula, written out with its N x N weights; everything but attention is inherited.
one = LegoConfig.parse("4/1x1", width=32, heads=2, classes=4)
block = LinearBlock(one)
h = torch.randn(2, 3, 16, 32)
q, k, v = block.qkv(h).unflatten(3, (3, 2, 16)).permute(3, 0, 1, 4, 2, 5)
w = (q.relu() + 1e-4) @ (k.relu() + 1e-4).mT
written_out = block.proj((w / w.sum(-1, keepdim=True) @ v).transpose(2, 3).flatten(3))
assert torch.allclose(block.mix(h), written_out, atol=1e-4)
heir = inherit(Lego(config, LinearConvBlock), model).state_dict()
for name, w in model.state_dict().items():
    assert torch.equal(heir[name], w) != is_attention(name), name

x0, labels = data.held(4)
def value_of(loss, net):
    torch.manual_seed(0)
    with torch.no_grad():
        return float(loss(net, x0, labels, 0))
taught = partial(second_draw, teacher=model)           # who agrees with itself
assert math.isclose(value_of(taught, model), value_of(lego_loss, model), rel_tol=1e-4)
assert value_of(taught, Lego(config)) > 1.2 * value_of(lego_loss, Lego(config))
assert value_of(second_draw, model) > 1.2 * value_of(lego_loss, model)

# DiCo: tokens mix, regions do not, and the channels are weighed by the mean of their own region.
block = DiCoBlock(LegoConfig.parse("8/1x1", width=32, heads=2))
h = torch.randn(1, 2, 64, 32)
near, far = h.clone(), h.clone()
near[0, 0, 9] += 1
before, after = block.mix(h), block.mix(near)
assert torch.equal(before[0, 1], after[0, 1])
assert (before[0, 0, 0] - after[0, 0, 0]).abs().max() > 1e-4                # a neighbour
assert (before[0, 0, 63] - after[0, 0, 63]).abs().max() > 1e-7              # by the mean alone
plain = ConvBlock(LegoConfig.parse("8/1x1", width=32, heads=2))
assert torch.equal(plain.mix(h)[0, 0, 63], plain.mix(near)[0, 0, 63])
assert block.fc1.out_features == 2 * 32

# DiMR: parameters per channel, time moves what comes out, and p0 - p1 leaves 0.
norm = TDLN(8, is_block=True)
assert all(getattr(norm, name).shape == (4, 8) for name in ("w", "b", "p0", "p1"))
with torch.no_grad():
    for p in norm.parameters():
        p.normal_()
tau = torch.tensor([[-1.5] + [0.] * 8, [1.5] + [0.] * 8])
out = norm(tau).view(2, 6, 8)
s = ((1 + norm.w) * tau[:, :1, None] + norm.b).sigmoid()
expected = norm.p1 + s * (norm.p0 - norm.p1)
assert torch.allclose(out[:, [0, 1, 3, 4]], expected)
assert torch.equal(out[:, [2, 5]], norm.gates.expand(2, -1, -1))
assert len({round(x, 4) for x in s[0].flatten().tolist()}) == 32    # one for each channel
small = replace(PAIR, width=16)
torch.manual_seed(0)
net = train(DiMR(small, TDLN), 12)
norms_of = [m for m in net.modules() if isinstance(m, TDLN)]
assert all(float((m.p0 - m.p1).abs().max()) > 1e-5 for m in norms_of)
x, still = torch.randn(1, 3, SIDE, SIDE), DiMR(small, NoTime)
still.load_state_dict(net.state_dict())
def moves(net):
    with torch.no_grad():
        low, high = (net(x, torch.tensor([t]), torch.tensor([0])) for t in (-.5, .5))
        return float((low - high).abs().max())
assert moves(net) > 1e-5 and moves(still) == 0
# The half-size brick: what it hands on is as smooth as enlarged pixels, and it costs the same.
net = cascade(HalfBrick)
for p in net.parameters():
    torch.nn.init.normal_(p, std=.2)
x = torch.randn(2, 3, SIDE, SIDE)
swapped = x.unflatten(3, (-1, 2)).flip(4).flatten(3)          # the same means of 2 x 2 pixels
first = [net(each, torch.zeros(2), return_all=True)[0] for each in (x, swapped)]
assert torch.allclose(*first, atol=1e-3) and first[0].abs().max() > .01
assert net.config.bricks[0].tokens == 64 == len(net.bricks[0].position)

# ViTok: PSNR is that of held-out scenes, E is the count of latents, and more of it helps.
for channels in (1, 8):
    assert Codec(channels).encode(data.held(2)[0])[0].numel() == 2 * 64 * channels
blank = Codec(1)
for p in blank.decoder.leave.parameters():
    torch.nn.init.zeros_(p)
x0 = data.held(16)[0]
assert math.isclose(psnr(blank), 10 * math.log10(4 / float(x0.square().mean())), rel_tol=.1)
trained = []
for channels in (1, 8):
    torch.manual_seed(0)
    trained.append(psnr(train(Codec(channels), 60, 0, codec_loss)))
assert trained[1] > trained[0] + 2 > psnr(blank) + 2, trained

# ReCAP: at the same x, what was kept is what would be computed, and new context is not looked at.
wide = ~is_known[0]
for sigma in edm.levels(18)[4:-1:3]:
    x, c_noise = sigma * torch.randn(2, 3, SIDE, SIDE), torch.full((2,), math.log(sigma) / 4)
    x = edm.coefficients(torch.tensor(sigma))[2] * x
    with torch.no_grad():
        filler.set_reuse(False)
        moved = filler(x + .1 * is_known, c_noise)
        full = filler(x, c_noise)
        filler.set_reuse(True)
        cheap = filler(x, c_noise)
        stale = filler(x + .1 * is_known, c_noise)
    assert torch.allclose(full, model(x, c_noise), atol=1e-5)
    assert torch.allclose(full[..., wide], cheap[..., wide], atol=1e-4), sigma
    assert not torch.allclose(moved[..., wide], full[..., wide], atol=1e-4)
    if all(config.bricks[k].region >= SIDE for k in config.running(sigma)):
        assert torch.allclose(stale[..., wide], cheap[..., wide], atol=1e-4)
assert all(len(row) == 7 for row in ROWS) and len(ROWS) == 12
