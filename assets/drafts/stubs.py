# The wrong version of every core, for which its check must fail. Run after the cells (serve).
import re as _re
_text = open("/work/s23/d/checks.py").read()
def _part(head):
    heads = ["# T-Stitch:", "# Diffusion Classifier:", "# PPGN:", "# PPAP:", "# LiT:", "# DiCo:", "# DiMR:", "# The half-size", "# ViTok:", "# ReCAP:"]
    i = heads.index(head)
    start = _text.index(head)
    end = _text.index(heads[i + 1]) if i + 1 < len(heads) else len(_text)
    return _text[start:end]
_loss = EDM.loss
STUBS = [
("# T-Stitch:", "threshold in sigma instead of the step", '''
def walked(choose, seed, n=N, sampler=edm.sampler):
    levels = edm.levels(STEPS)
    seeds = [generator(seed, i) for i in range(n)]
    x = levels[0] * lego.normal((n, config.channels, SIDE, SIDE), seeds, "cpu")
    def estimate(step, x, sigma):
        net, skip = choose(levels.index(sigma))
        with autocast():
            x0_hat = edm.estimate(net, x, sigma, torch.arange(n) % CLASSES, skip=skip)
        return x0_hat.clamp(-1, 1)
    with torch.no_grad():
        *_, x = lego.walk(x, levels, sampler, estimate, None)
    return x
'''),
("# T-Stitch:", "always the large network", '''
stitch = lambda rho, small, apart, small_first=True: lambda step: (model, ())
'''),
("# Diffusion Classifier:", "noise never shared", '''
_e = errors
errors = lambda net, images, candidates, draws, shared=True: _e(net, images, candidates, draws, False)
'''),
("# Diffusion Classifier:", "noise always shared", '''
_e = errors
errors = lambda net, images, candidates, draws, shared=True: _e(net, images, candidates, draws, True)
'''),
("# PPGN:", "e1 ignored", '''
_p = plug_in
plug_in = lambda log_p, e1=1.0, e2=30.0: _p(log_p, 1.0, e2)
'''),
("# PPGN:", "gradient the wrong way", '''
_p = plug_in
plug_in = lambda log_p, e1=1.0, e2=30.0: _p(log_p, e1, -e2)
'''),
("# PPAP:", "experts learn nothing", '''
learn = lambda teacher, net, low, high, steps, seed: net.requires_grad_(False)
'''),
("# PPAP:", "always the first expert", '''
in_range = lambda some: lambda sigma: some[0]
'''),
("# PPAP:", "all experts learn the whole range", '''
_l = learn
learn = lambda teacher, net, low, high, steps, seed: _l(teacher, net, LOW, HIGH, steps, seed)
'''),
("# LiT:", "softmax in place of linear attention", '''
class LinearBlock(Block):
    def mix(self, h):
        return super().mix(h)
'''),
("# LiT:", "inherits attention as well", '''
def inherit(net, teacher):
    net.load_state_dict(teacher.state_dict(), strict=False)
    return net
'''),
("# LiT:", "inherits nothing", '''
inherit = lambda net, teacher: net
'''),
("# DiCo:", "identity mixer", '''
class DiCoBlock(ConvBlock):
    channels_by = "weighing"
    def mix(self, h):
        return h
'''),
("# DiCo:", "mean over all regions", '''
class DiCoBlock(ConvBlock):
    channels_by = "weighing"
    def mix(self, h):
        plain = ConvBlock.mix(self, h)
        return plain * self.channels(h.mean((1, 2), keepdim=True)).sigmoid()
DiCoBlock.__mro__
'''),
("# DiCo:", "convolution without channel attention", '''
class DiCoBlock(ConvBlock):
    channels_by = None
'''),
("# DiMR:", "one scalar for all channels", '''
class TDLN(TDLN):
    def __init__(self, width, is_block):
        super().__init__(width, is_block)
        count = 4 if is_block else 2
        self.w, self.b = nn.Parameter(torch.zeros(count, 1)), nn.Parameter(torch.zeros(count, 1))
'''),
("# DiMR:", "no time", '''
TDLN = type("TDLN", (TDLN,), dict(knows_time=False))
'''),
("# The half-size", "full resolution", '''
def cascade(kind):
    return Lego(PAIR)
'''),
("# ViTok:", "channels ignored", '''
_C = Codec
Codec = lambda channels, *how: _C(1, *how)
'''),
("# ViTok:", "decoder sees no latents", '''
class Codec(Codec):
    def decode(self, z):
        return super().decode(z * 0)
'''),
("# ReCAP:", "nothing kept: all is computed anew", '''
class Filler(Filler):
    def set_reuse(self, reuse):
        super().set_reuse(False)
filler = Filler(model, is_known).eval()
'''),
("# ReCAP:", "known tokens say nothing to later bricks", '''
class Filling(Filling):
    def orchestrate(self, h, c, mask):
        if self.blocks[0].reuse:
            self.said = 0 * self.said
        return super().orchestrate(h, c, mask)
for _b in filler.bricks:
    if _b.__class__.__name__ == "Filling":
        _b.__class__ = Filling
'''),
("# LiT:", "taught nothing", '''
second_draw = lambda net, x0, labels, step, teacher=None: lego_loss(net, x0, labels, step)
'''),
("# ReCAP:", "keys kept, values forgotten", '''
class Keeping(Keeping):
    def mix(self, h):
        if self.reuse:
            self.kept = self.kept[0], 0 * self.kept[1]
        return super().mix(h)
for _b in filler.bricks:
    for _k in _b.blocks:
        _k.__class__ = Keeping
'''),
]
for head, name, code in STUBS:
    space = dict(globals())
    kept = {k: v for k, v in stitched.items()}
    try:
        exec(compile(code, "stub", "exec"), space)
        exec(compile(_part(head), "check", "exec"), space)
        print("STUB PASSES (bad):", head, name, flush=True)
    except Exception as e:
        tb = traceback.extract_tb(e.__traceback__)[-1]
        print("fails as it should:", head, name, "--", type(e).__name__, str(e)[:80], "line", tb.lineno, tb.filename, flush=True)
    EDM.loss = _loss
    stitched.clear(); stitched.update(kept)
    for net in (model, little): net._forward_pre_hooks.clear()
