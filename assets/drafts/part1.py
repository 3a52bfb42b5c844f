# ruff: noqa: the cells of Part I, in order

section("0")

md(r"""
# LEGO diffusion, brick by brick

A diffusion model draws a picture by taking noise away in many small steps. The network that does it
is usually one large Transformer, which runs in full at every step. *LEGO* builds it from **bricks**
instead: small networks, each of which hands on a picture of full size, so that a brick can be left
out wherever it is not needed.

This notebook takes such a network apart, trains one, leaves parts of it out, and lets you rebuild
it. You should know PyTorch and what a Transformer block is. Diffusion is explained from the start.

| | question | reading time |
|---|---|---|
| 1 | What do we build? | 4 minutes |
| 2 | How can a network draw a picture out of noise? | 7 minutes |
| 3 | What happens inside one brick? | 9 minutes |
| 4 | What does each brick add, and at which noise level? | 6 minutes |
| 5 | How do bricks learn to stand alone? | 9 minutes |
| 6 | What may be skipped, and what does that save? | 7 minutes |
| 7 | How does a network for small pictures draw a panorama? | 6 minutes |
| 8 | Can you build it yourself? | as long as you like |

The cells run in less than a quarter of an hour on two CPU cores, without a GPU and without the
network. The last one of each section prints how long its section took on the machine that
made the pictures below. An appendix holds what only some readers need, and Part II is about
related papers.

Three voices are kept apart. *The paper* is Zheng et al.,
[Learning Stackable and Skippable LEGO Bricks](https://arxiv.org/abs/2310.06389) (ICLR 2024), *the
released code* is its authors' repository, and *ours* marks a choice that was made in this project.
All code that is discussed is that of [`lego.py`](lego.py), printed here as it stands there.
""")

py(r"""
import contextlib, copy, io, itertools, math, os, textwrap, time
from dataclasses import replace
from inspect import getsource
from pathlib import Path
import numpy as np, torch
from PIL import Image, ImageDraw, ImageFont
import lego, sample_tiny, train_tiny
from assets import measure
from lego import EDM, BrickSpec, Grid, Lego, LegoConfig, generator
QUICK = "LEGO_QUICK" in os.environ      # the tests set it: every budget shrinks
STARTED = time.time(), time.process_time()
LAPS = [STARTED[0]]
""")

py(r"""
model = lego.load_checkpoint("assets/landscapes.pt")    # trained beforehand
config, edm = model.config, EDM()
K, SIDE = len(config.bricks), config.size               # bricks, and pixels along an edge
STEPS = 4 if QUICK else 18                              # of drawing a picture
train_tiny.keep_memory()
autocast = train_tiny.pick_precision("auto", torch.device("cpu"))
data = train_tiny.load_data("landscapes", "", SIDE)     # drawn by a program, without end
""")

md(r"""
Four helpers serve all sections: one shows images, one writes words beside them, one prints shipped
code, and one tells the time. You need not read them.
""")

py(r"""
def sheet(images, columns=None, times=None):
    '''A picture of float images (n, C, H, W) in [-1, 1], their pixels enlarged.'''
    columns, times = columns or len(images), times or max(1, 96 // images.shape[2])
    small = train_tiny.picture(train_tiny.to_bytes(images), columns, enlarge=False)
    return small.resize((small.width * times, small.height * times), Image.NEAREST)
""")

py(r"""
def titled(picture, heads=(), rows=(), left=150):
    '''A picture with words above its columns and beside its rows.'''
    font, left, top = ImageFont.load_default(14), left if rows else 0, 24 if heads else 0
    page = Image.new("RGB", (picture.width + left, picture.height + top), "white")
    page.paste(picture, (left, top))
    draw = ImageDraw.Draw(page)
    for i, words in enumerate(heads):
        middle = left + picture.width * (i + .5) / len(heads)
        draw.text((middle, 12), words, "black", font, "mm")
    for i, words in enumerate(rows):
        middle = top + picture.height * (i + .5) / len(rows)
        draw.text((left - 8, middle), words, "black", font, "rm")
    return page
""")

py(r"""
class Text:
    '''Markdown that a cell writes.'''
    def __init__(self, text):
        self.text = text

    def _repr_markdown_(self):
        return self.text


def shipped(*things):
    '''The shipped source of functions.'''
    sources = [textwrap.dedent(getsource(thing)) for thing in things]
    return Text("\n".join(f"```python\n{source}```" for source in sources))
""")

py(r"""
def table(head, rows):
    '''Rows of words as a table.'''
    lines = [head, ["---"] * len(head), *rows]
    return Text("\n".join("| " + " | ".join(line) + " |" for line in lines))


def took(number):
    '''Say how long a section took.'''
    LAPS.append(time.time())
    print(f"section {number} took {(LAPS[-1] - LAPS[-2]) / 60:.1f} minutes")
""")

# ---------------------------------------------------------------------------------------
section("1")

md(r"""
## 1. What do we build?

*4 minutes.* We build a network that draws landscapes of four classes. These are two of each class:
""")

py(r"""
def samples(net, n=8, size=(SIDE, SIDE), steps=STEPS, **settings):
    '''n pictures, the classes in turn. Picture i always starts from the same noise.'''
    labels = torch.arange(n) % net.config.classes
    seeds = [generator(0, i) for i in range(n)]
    with autocast():
        return edm.sample(net, (n, 3, *size), labels, steps=steps,
                          generator=seeds, clip=True, **settings)


titled(sheet(samples(model)), 2 * train_tiny.LANDSCAPES)
""")

md(r"""
*Look at the skies, the ridges and the suns: bricks can draw a scene, and two pictures of a class
differ. The network is small and was trained on a CPU, so look also for what is weak: ridges that
dissolve, and suns without a clear edge.*

**A brick** is a small Transformer. It gets the noisy image $x$ and a picture $z$, which is the
guess of the bricks before it, and it hands on a better $z$. (Strictly, $z$ is that guess in another scale,
called $F$. Until section 2, think of it as a picture.) It cuts both pictures into square
**regions**, and each region into square **patches**. An MLP turns every patch into one **token**.
The tokens of a region attend to each other, and to no others. Then each token is decoded to the
pixels of its patch.

The drawing shows this for a brick of our stack. (The code before each of the two drawings mostly draws, so
you may skip it.)
""")

py(r"""
x0, labels = data.held(8)               # scenes that were not trained on
eps = torch.randn(x0.shape, generator=generator("noise"))
ONE = slice(1, 2)                       # the scene that we follow through the network


def noisy(sigma):
    '''Our scene with noise of level sigma, (1, C, H, W).'''
    return x0[ONE] + sigma * eps[ONE]
""")

py(r"""
def pieces(image, spec):
    '''An image (1, C, H, W), enlarged and pulled apart: thin gaps between patches, wide
    ones between regions and around all.'''
    place = torch.arange(SIDE * 5)              # a pixel has 5 x 5 of them
    place = 4 + place + place // (5 * spec.patch) + 8 * (place // (5 * spec.region))
    apart = torch.ones(1, 3, place[-1] + 5, place[-1] + 5)
    large = image.repeat_interleave(5, 2).repeat_interleave(5, 3)
    apart[:, :, place[:, None], place] = large
    return apart


def thumb(images, side):
    '''Images (1, C, H, W) as a square picture.'''
    return sheet(images, times=1).resize((side, side), Image.LANCZOS)
""")

py(r"""
LOCAL = [k for k, spec in enumerate(config.bricks) if spec.region < SIDE] or [K - 1]
hero = LOCAL[0]                 # the brick that we look into: the first with small regions
spec = config.bricks[hero]


def level(spec):
    '''A noise level at which a brick works.'''
    low, high = spec.noise
    return max(low, .6 * min(high, 1))


sigma = level(spec)
run = config.running(sigma)
with torch.no_grad():
    every = edm.denoise(model, noisy(sigma), sigma, labels[ONE], return_all=True)
after = every[run.index(hero)]
before_it = every[run.index(hero) - 1] if run.index(hero) else 0 * after
""")

py(r"""
def words(draw, x, y, text, size=27, anchor="mm", colour="black"):
    draw.text((x, y), text, colour, ImageFont.load_default(size), anchor, align="center")


def box(draw, left, name, text, colour):
    '''One of the works of a brick.'''
    draw.rounded_rectangle((left, 110, left + 210, 320), 24, colour)
    words(draw, left + 105, 150, name, 32)
    words(draw, left + 105, 238, text, 24)


def arrow(draw, x, y, to, colour="black"):
    draw.line((x, y, to, y), colour, 5)
    draw.polygon([(to + 12, y), (to - 8, y - 12), (to - 8, y + 12)], colour)
""")

py(r"""
page = Image.new("RGB", (1780, 470), "white")           # halved in the end, so lines are smooth
draw = ImageDraw.Draw(page)
for y, image, name in ((15, noisy(sigma), "x"), (220, before_it, "z")):
    page.paste(thumb(image, 170), (60, y))
    words(draw, 30, y + 85, name, 34)
    arrow(draw, 240, y + 85, 275)
page.paste(thumb(pieces(noisy(sigma), spec), 230), (300, 100))
words(draw, 415, 70, "cut", 32)
for x in (540, 800, 1060, 1320):
    arrow(draw, x, 215, x + 35)
arrow(draw, 1455, 215, 1500)
box(draw, 590, "enrich", "an MLP makes\neach patch\na token", "#cfe3f7")
box(draw, 850, "orchestrate", "attention\ninside each\nregion", "#f9dcc4")
box(draw, 1110, "decode", "each token\nbecomes pixels", "#d8ecd0")
""")

py(r"""
draw.ellipse((1370, 175, 1450, 255), "#eeeeee")
words(draw, 1410, 213, "+", 50)
page.paste(thumb(after, 230), (1520, 100))
words(draw, 1635, 70, "new z", 32)
draw.line([(145, 400), (145, 440), (1410, 440), (1410, 270)], "#999999", 5)
draw.polygon([(1410, 258), (1398, 280), (1422, 280)], "#999999")
words(draw, 780, 412, "z goes past the brick. If the brick is skipped, only this line is left.",
      25, colour="#666666")
page.resize((890, 235), Image.LANCZOS)
""")

md(r"""
*Look at the gray line: since a brick only adds to $z$, the stack still runs without the brick. That the
result makes sense as well has to be learnt (section 5). (The two $z$ are drawn as the pictures that they stand for. Section 2 explains that.)*

**A stack** is a list of bricks. Every brick has a **noise range**, which are the levels of noise at
which it works (*ours*; the paper chooses only while drawing which brick runs when). At other levels
it is skipped, and it costs nothing.
""")

py(r"""
def at(sigma):
    '''The place of a noise level on the axis of the drawing.'''
    sigma = min(max(sigma, .01), 80)
    return 620 + 1080 * math.log(sigma / .01) / math.log(80 / .01)


def hue(k):
    return f"hsl({210 + 360 * k // K}, 60%, 72%)"


def about(spec):
    return f"regions of {spec.region}, patches of {spec.patch},\n{spec.depth} Transformer blocks"


def span(low, high):
    '''A noise range in words.'''
    if low and high < math.inf:
        return f"runs at sigma {low:g} to {high:g}"
    if low:
        return f"runs from sigma {low:g} upwards"
    return f"runs below sigma {high:g}" if high < math.inf else "runs at all levels"
""")

py(r"""
page = Image.new("RGB", (1780, 150 * K + 230), "white")
draw = ImageDraw.Draw(page)
for k, spec in enumerate(config.bricks):
    y, (low, high) = 20 + 150 * k, spec.noise
    words(draw, 20, y + 60, f"brick {k}", 32, "lm")
    words(draw, 300, y + 60, about(spec), 23)
    page.paste(thumb(pieces(noisy(0), spec), 130), (465, y))
    draw.rounded_rectangle((at(low), y + 20, at(high), y + 110), 20, hue(k))
    words(draw, (at(low) + at(high)) / 2, y + 65, span(low, high))
for s in (.02, .07, .25, .9, 3.2, 12, 45):
    seen = thumb(sample_tiny.unit_scale(noisy(s), s), 130)
    page.paste(seen, (int(at(s)) - 65, page.height - 190))
    words(draw, at(s), page.height - 30, f"{s:g}")
words(draw, 580, page.height - 30, "noise sigma", anchor="rm")
page.resize((890, page.height // 2), Image.LANCZOS)
""")

md(r"""
*Read it from right to left, as a picture is drawn. Where noise is high, few bricks decide what the
picture shows. Towards the left others join or take over. Those with smaller patches work on details. The small pictures in front show how each brick cuts an image.*

A brick is written `region/patch x depth @ low:high`, so this stack is
""")

py(r"""
print(config)
print(train_tiny.table(model, [s for _, s in edm.evaluations()]))
""")

md(r"""
The table also tells what each brick costs: FLOPs are floating-point operations, and the last column
is a brick's share of those for one picture.

The names below are those of the code, and every equation uses them. *Deviation* always means standard
deviation.

| symbol | in the code | what it is |
|---|---|---|
| $x_0$ | `x0` | a clean image, whose numbers lie in $[-1, 1]$ |
| $\sigma$ | `sigma` | the noise level, which is the standard deviation of the noise |
| $\epsilon$ | `eps`, `noise` | unit noise: independent normal numbers of deviation 1 |
| $x = x_0 + \sigma\epsilon$ | `x` | a noisy image |
| $\hat x_0$ | `x0_hat` | an estimate of $x_0$ |
| $F$ | `F` | what the network puts out, from which $\hat x_0$ is computed (section 2) |
| $z$ | `z` | the estimate of $F$ that one brick hands to the next |
| $c$ | `c` | the condition: a vector that tells the noise level and the class |
| $B, C, H, W$ | | images in a batch, colour channels, height and width |
| $R, N, p, D$ | | regions of an image, tokens of a region, side of a patch, width of a token |
| $K$ | `K` | the number of bricks, which are numbered from 0 |
""")

py("took(1)")

# ---------------------------------------------------------------------------------------
section("2")

md(r"""
## 2. How can a network draw a picture out of noise?

*7 minutes.* Take a clean image $x_0$ and add noise of level $\sigma$:

$$x = x_0 + \sigma\,\epsilon.$$

If $\sigma$ is small, almost everything can still be seen. If it is large, nothing can. A network learns to guess $x_0$ from $x$ and $\sigma$. This is all that it is trained to do.

Before we use a network, we ask how far one gets **without** one. The simplest guess multiplies $x$
by a number $a$. Which $a$ has the least squared error? If the pixels of $x_0$ have
mean 0 and deviation $\sigma_d$, and the noise knows nothing of the image, then

$$\mathbb E\,(x_0 - a x)^2 = (1 - a)^2\sigma_d^2 + a^2\sigma^2
\quad\text{is least at}\quad a = c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2},
\quad\text{where it is}\quad c_{out}^2 = \frac{\sigma^2\sigma_d^2}{\sigma^2 + \sigma_d^2}.$$

We check the formula with 256 landscapes. We find $a$ by least squares, and we compare it with
$c_{skip}$ for the deviation that these landscapes have.
""")

py(r"""
levels = [.03, .1, .3, 1., 3., 20.]
many = train_tiny.to_float(train_tiny.landscapes(1, range(256), SIDE, SIDE)[0])
many = many - many.mean((0, 2, 3), keepdim=True)        # mean 0, as the formula assumes
measured = EDM(sigma_data=many.std().item())
for s in levels:
    x = many + s * torch.randn(many.shape, generator=generator("linear", s))
    a = (many * x).sum() / (x * x).sum()
    c_skip, c_out, *_ = measured.coefficients(torch.tensor(s))
    print(f"sigma {s:<5} least squares {a:.4f}, formula {c_skip:.4f}")
    assert abs(a - c_skip) < .01
""")

md(r"""
So the network has to add only what this best linear guess lacks:

$$\hat x_0 = c_{skip}\,x + c_{out}\,F(c_{in}\,x,\ c_{noise}).$$

The error of the linear guess has the deviation $c_{out}$, so what $F$ has to say,
$(x_0 - c_{skip}x)/c_{out}$, has deviation 1 at *every* noise level. The factor
$c_{in} = 1/\sqrt{\sigma^2 + \sigma_d^2}$ does the same for what $F$ sees. And
$c_{noise} = \ln(\sigma)/4$ tells it the noise level (the logarithm, since levels from 0.002 to 80 matter alike). These coefficients are those of EDM, the design of
diffusion models by Karras et al. (2022), who take $\sigma_d = 0.5$:
""")

py("shipped(EDM.coefficients)")

py(r"""
sigmas, lines = np.geomspace(.01, 50, 25).tolist(), []
for s in sigmas:
    c_skip, c_out, c_in, _ = edm.coefficients(torch.tensor(s))
    x = many + s * torch.randn(many.shape, generator=generator("scale", s))
    target = (many - c_skip * x) / c_out
    lines.append([float(v) for v in ((c_in * x).std(), target.std(), c_skip, c_out)])
names = "scale of the input, c_in x", "scale of the target, F", "c_skip", "c_out"
curves = {name: (sigmas, list(line)) for name, line in zip(names, zip(*lines))}
measure.plot(curves, "sigma", "deviation or factor", log_x=True)
""")

md(r"""
*Look at the upper two curves: from hardly any noise to nothing but noise, the network sees numbers
of one size and puts out numbers of one size. (They lie a little above 1 since the deviation of landscapes is a little above 0.5: the input where noise
is low, for it is all image there, and the target where noise is high.) The lower two show how the picture is made up: of $x$ itself
where noise is low, and of what the network says where it is high.*

This matters to LEGO for two reasons. Bricks hand on $F$, and not $\hat x_0$ (as in the released
code; the paper writes $\hat x_0$). So every brick sees a $z$ of the same size. And the first brick
starts from $z = 0$, which now means "the best linear guess".

Here are both guesses at six noise levels, with the trained network in the third row. It is told the
class of each scene, here sunset.
""")

py(r"""
columns, lines = [], []
with torch.no_grad():
    for s in levels:
        c_skip, c_out, *_ = edm.coefficients(torch.tensor(s))
        x = x0 + s * eps
        x0_hat = edm.denoise(model, x, s, labels)
        linear, ours = ((guess - x0).square().mean() for guess in (c_skip * x, x0_hat))
        lines.append(f"sigma {s:<5} squared error {ours:.5f}: {ours / linear:.1%} of {linear:.5f}")
        rows = [sample_tiny.unit_scale(x, s), c_skip * x, x0_hat, x0]
        columns.append(torch.stack([row[1] for row in rows]))
""")

py(r"""
print("the network's error, and that of the linear guess, over eight images", *lines, sep="\n")
names = "noisy image x", "linear guess", "network", "truth x0"
titled(sheet(torch.stack(columns, 1).flatten(0, 1), 6), [f"sigma {s:g}" for s in levels], names)
""")

md(r"""
*Look down each column. Where noise is low, the linear guess is good and the network only cleans it.
Where noise is high, the linear guess is gray, and the network shows a blurred scene: it cannot know
which scene it was, so it puts out the average of those that fit. That average is the best guess in
squared error, and it is no picture yet.*

To get a picture, we do not jump to the guess. We take a small step towards it, which lowers the noise a little, and then guess again. Every step rules out some of the scenes that were
possible before, so the next guess is less of an average. We start at the highest level, where $x$ is nothing but noise. Each step follows the slope (Karras et al., equations 1 and 3)

$$\frac{dx}{d\sigma} = \frac{x - \hat x_0(x, \sigma)}{\sigma}.$$

Along it, a step from $\sigma$ to a lower $\sigma'$ leads to $\hat x_0 + \frac{\sigma'}{\sigma}(x - \hat x_0)$: the guess,
plus the noise that $x$ is thought to hold, made smaller. No new noise is drawn, so the first noise decides
which picture comes out.

To follow the slope all the way from $\sigma$ to $\sigma'$ is Euler's method. `dpm2m` (DPM-Solver++, Lu et al.
2022) does better at the same price. Between two steps the guess has moved, and it will go on moving, so the
step goes by a guess that is carried on in the same direction, called `ahead`. With `h` $= \ln(\sigma/\sigma')$
the last line is the formula above, since $-$`expm1(-h)` is $1 - \sigma'/\sigma$. `levels` says which
noise levels the steps lead through. They lie closer together where noise is low. Each step runs the
network once, which the table of the stack calls an evaluation.
""")

py("shipped(lego.dpm2m, EDM.levels)")

md(r"""
We follow one picture on its way. `sample` calls the function `guide` with every guess, and we use it
to look on.
""")

py(r"""
seen = {}                       # for every noise level what was given and what was guessed


def watch(x0_hat, x, sigma):
    seen[sigma] = sample_tiny.unit_scale(x, sigma), x0_hat
    return x0_hat


samples(model, 1, guide=watch)
picked = sorted(seen, reverse=True)[::2]
walk = torch.cat([seen[s][i] for i in (0, 1) for s in picked])
heads = [f"{s:.2g}" for s in picked]
titled(sheet(walk, len(picked)), heads, ["x", "guess of x0"], 100)
""")

md(r"""
*This is the figure to remember: noise falls from left to right, the numbers are $\sigma$. Follow the
lower row. Colours are there first, then large shapes, and edges last. So different noise levels ask
for different work, and this is why different bricks may do it.*
""")

py("took(2)")

# ---------------------------------------------------------------------------------------
section("3")

md(r"""
## 3. What happens inside one brick?

*9 minutes.* A brick does five things: it cuts, enriches, orchestrates, decodes and joins. The paper
calls the second local-feature enrichment (LE) and the third global-content orchestration (GO).

$$z_{new} = z + \mathrm{decode}\Big(\mathrm{GO}\big(\mathrm{LE}([z, x, m]) + e,\ c\big),\ c\Big)$$

Here $m$ holds the row and the column of every pixel, and $e$ is a fixed table that tells each token
where it lies in its region. This is the code. The lines before `new = []` cut the
canvas, and the lines after it do the work. At a first reading, ignore `regions` (section 5), `offset`
(section 7), `mask`, which hides padding, and `few`, which saves memory.
""")

py("shipped(lego.Brick.forward, lego.Brick.enrich, lego.Brick.orchestrate)")

md(r"""
Now we watch one image go through the brick of the drawing in section 1. PyTorch's hooks catch what
its layers take in and put out.
""")

py(r"""
brick, spec = model.bricks[hero], config.bricks[hero]
caught = {}


def catch(name, layer):
    return layer.register_forward_hook(lambda _, given, made: caught.update({name: (given, made)}))


hooks = [catch("brick", brick), catch("first", brick.blocks[0]), catch("last", brick.blocks[-1]),
         catch("qkv", brick.blocks[-1].qkv), catch("decode", brick.decode)]
with torch.no_grad():
    edm.denoise(model, noisy(sigma), sigma, labels[ONE])
for hook in hooks:
    hook.remove()
""")

py(r"""
(x_in, z, c, *_), z_new = caught["brick"]               # x_in is c_in x
tokens, _ = caught["first"][0][:2]                      # what enters the first block
mixed, correction = caught["last"][1], caught["decode"][1]
grid = Grid(spec, config, SIDE, SIDE)
place = grid.coordinates("cpu")[None]                   # m
shapes = dict(z=z, x=x_in, cut=grid.cut(x_in), m=place, tokens=tokens, attended=mixed,
              decoded=correction, joined=z_new)
print(f"brick {hero} ({spec}) at sigma {sigma:.2g}")
for name, tensor in shapes.items():
    print(f"{name:<9}", tuple(tensor.shape))
""")

md(r"""
Each of these tensors can be looked at. A token has too many numbers to be a colour, so we take the
three directions in which the tokens differ most, and show these as red, green and blue. Tokens of
the same colour say about the same.
""")

py(r"""
def coloured(h):
    '''Tokens h (1, R, N, D) as a picture: a square for each patch, alike where tokens are.'''
    flat = h[0].flatten(0, 1)
    flat = flat - flat.mean(0)
    main = flat @ torch.linalg.svd(flat, full_matrices=False)[2][:3].T
    main = (main / (2 * main.std(0))).view(1, *h.shape[1:3], 3)
    return grid.join(main.repeat(1, 1, 1, spec.patch ** 2))


def estimate(F):
    '''The picture that F or z stands for.'''
    c_skip, c_out, *_ = edm.coefficients(torch.tensor(sigma))
    return c_skip * noisy(sigma) + c_out * F
""")

py(r"""
pulled = [sample_tiny.unit_scale(noisy(sigma), sigma), estimate(z)]
rows, columns = grid.join(place.flatten(3)).split(1, 1)
where = torch.cat([rows, columns, -torch.ones_like(rows)], 1)
added = grid.join(correction)
change = (added / added.abs().max()).clamp(-1, 1)
stages = [*pulled, where, coloured(tokens), coloured(mixed), change, estimate(z_new), x0[ONE]]
heads = ["x", "z", "place m", "tokens", "attended", "correction", "new z", "(truth)"]
stages = [pieces(image, spec) for image in stages]
display(titled(sheet(torch.cat(stages[:4]), 4, 1), heads[:4]))
titled(sheet(torch.cat(stages[4:]), 4, 1), heads[4:])
""")

md(r"""
*This is the figure to remember: one image on its way through a brick. Follow it from the upper left.
The brick gets $x$, the picture that $z$ stands for, and the place of each pixel. Then
compare the tokens before and after the blocks (attended): do the sun, the sky and the ground have
colours of their own? (Each of the two panels has its own colours, so compare places inside a panel.) Regions do not see each
other here. Where colours agree across the border of two regions, it is because regions share their weights,
and because $z$ may come from a brick that saw the whole image. The correction is gray where the
brick changes nothing. Compare it with the difference between z and the truth, which it should fill.*

**Attention** is the one place where tokens meet. It is the only method to replace for another
mixer (section 8):
""")

py("shipped(lego.Block.mix, lego.attention)")

md(r"""
To see it, we ask `attention` for its weights: with the identity in the place of $v$ it returns them.
For one token in each region (they are numbered row by row), the next picture shows how much it takes
from which place.
""")

py(r"""
def map_of(token):
    '''For this token of every region, where it looks: mean over the heads, as a picture.'''
    weight = weights[:, :, token].mean(1)                       # (R, N)
    weight = weight / weight.amax(1, keepdim=True)
    colour = weight.sqrt()[None, :, :, None].repeat(1, 1, 1, 3)
    colour[0, :, token] = torch.tensor([1, .2, .1])             # the one that looks is red
    return 2 * grid.join(colour.repeat(1, 1, 1, spec.patch ** 2)) - 1


qkv = caught["qkv"][1]
q, k, v = qkv.view(-1, spec.tokens, 3, config.heads, config.width // config.heads).permute(
    2, 0, 3, 1, 4)
weights = lego.attention(q, k, torch.eye(spec.tokens).expand(*q.shape[:2], -1, -1))
""")

py(r"""
side = spec.region // spec.patch
asking = [side + 1, side // 2 * (side + 1), side * side - 2]
maps = [pieces(map_of(token), spec) for token in asking]
heads = [f"where token {token} looks" for token in asking] + ["the scene"]
titled(sheet(torch.cat([*maps, pieces(x0[ONE], spec)]), times=1), heads)
""")

md(r"""
*The brighter a square of the map, the more the red token takes from there (in the last block; each region
is scaled by itself). Each map ends where its region
ends, because no token of another region is among the $N$ that it can see. So the cost of attention
grows with the number of pixels, as the number of regions does, and not with its square.*

**The condition** $c$ reaches every block as a shift, a scale and a gate, twice (adaLN-Zero, Peebles
& Xie 2023):

$$h \leftarrow h + gate_1 \odot \mathrm{mix}\big(\mathrm{LN}(h)(1 + scale_1) + shift_1\big),\qquad
h \leftarrow h + gate_2 \odot \mathrm{mlp}\big(\mathrm{LN}(h)(1 + scale_2) + shift_2\big).$$

All six are linear in $c$, and they start at zero. The decoder starts at zero as well. So a new block
changes no token, and a new brick hands on the $z$ that it got.
""")

py("shipped(lego.Block.forward)")

py(r"""
torch.manual_seed(0)
fresh = Lego(config)
with torch.no_grad():
    old = torch.randn(1, 3, SIDE, SIDE)
    new = fresh.bricks[hero](x_in, old, torch.randn(1, config.width))
assert torch.equal(new, old)
print("an untrained brick hands on exactly the z that it got")
""")

md(r"""
**How far does a brick see?** We change one pixel of $x$ by a little, and look at which pixels of the
brick's output change. Each brick is alone here, so $z = 0$, at a noise level where it works. The last
picture is the whole stack.
""")

py(r"""
SPOT = 13, 18                   # row and column of the pixel that is changed


def effect(run, x):
    '''How much each pixel of run(x) changes, (H, W), if x changes at SPOT.'''
    moved = x.clone()
    moved[0, :, *SPOT] += .1
    with torch.no_grad():
        return (run(moved) - run(x)).abs().sum(1)[0]


def given(s):
    '''What bricks get at the noise level s: c_in x, and ln(s)/4.'''
    *_, c_in, c_noise = edm.coefficients(torch.tensor([s]))
    return c_in * noisy(s), c_noise


def light(change):
    '''Light where anything changes, the lighter the more, over seven powers of ten.'''
    seen = (change / change.max()).clamp(1e-7).log10() / 7 + 1
    return (2 * seen - 1).expand(1, 3, -1, -1)
""")

py(r"""
zero, maps, lines = torch.zeros_like(x_in), [], []
for k, (brick, spec) in enumerate(zip(model.bricks, config.bricks)):
    x, c_noise = given(level(spec))
    c = model.condition(c_noise, labels[ONE])
    change = effect(lambda x: brick(x, zero, c), x)
    inside = torch.ones(SIDE, SIDE, dtype=bool)
    for axis, spot in zip((inside, inside.T), SPOT):
        axis[:spot // spec.region * spec.region] = False
        axis[(spot // spec.region + 1) * spec.region:] = False
    assert not change[~inside].any()
    near = change[SPOT[0] - 2:SPOT[0] + 3, SPOT[1] - 2:SPOT[1] + 3].sum() / change.sum()
    lines.append([f"{k} ({spec})", str(int(inside.sum())), str(int((change > 0).sum())),
                  str(int((change[~inside] > 0).sum())), f"{near:.0%}"])
    maps.append(light(change))
""")

py(r"""
x, c_noise = given(sigma)
change = effect(lambda x: model(x, c_noise, labels[ONE]), x)
near = change[SPOT[0] - 2:SPOT[0] + 3, SPOT[1] - 2:SPOT[1] + 3].sum() / change.sum()
lines.append([f"the stack, bricks {run}", str(SIDE ** 2), str(int((change > 0).sum())), "0",
              f"{near:.0%}"])
display(titled(sheet(torch.cat([*maps, light(change)]), times=4),
               [f"brick {k}" for k in range(K)] + ["stack"]))
table(["one pixel changes in", "pixels of its region", "pixels that change",
       "of them outside", "share of the change within 2 pixels"], lines)
""")

md(r"""
*Light is on a logarithmic scale, so even tiny changes can be seen. A brick with small regions changes
nothing outside of the region of the pixel, not by the smallest amount. A brick whose region is the
whole image can change it everywhere. The stack does so as soon as one of its bricks sees everything,
because that brick hands on what it saw in $z$. The last column of the table says how much of the change
stays near the pixel: seeing everything does not mean to treat all of it alike.*
""")

py("took(3)")

# ---------------------------------------------------------------------------------------
section("4")

md(r"""
## 4. What does each brick add, and at which noise level?

*6 minutes.* The stack is a loop. A brick runs for the images that lie in its noise range, and for
all others $z$ goes past it:
""")

py("shipped(Lego.forward)")

md(r"""
`rows` says for which images of a batch each brick runs. It is read off the noise levels, unless the
caller knows it already. `hidden` and `regions` are for training (section 5), and `detach` cuts the gradient that would
flow through $z$ into the bricks before (*ours*), so that each brick learns from its own loss.

Which bricks run where? A brick may be left out as long as the others still cover every noise level:
""")

py(r"""
ends = sorted({end for spec in config.bricks for end in spec.noise})
for low, high in zip(ends, ends[1:]):
    print(f"{low:g} <= sigma < {high:g}: bricks {config.running(low or high / 2)} run")
subsets = sample_tiny.covering_subsets(config)          # what may be left out


def stays(skip):
    '''The bricks that are left, in words.'''
    return " ".join(str(k) for k in range(K) if k not in skip)


print(f"{len(subsets)} subsets cover all levels. They keep the bricks", *map(stays, subsets),
      sep=" | ")
""")

md(r"""
All bricks estimate the same thing, so we can ask each of them for its picture. Here they are at three
noise levels, white where a brick does not run.
""")

py(r"""
show, rows, names, truth = [.1, .6, 4.], [], [], x0[ONE]
blank = torch.ones_like(truth)
for s in show:
    with torch.no_grad():
        every = edm.denoise(model, noisy(s), s, labels[ONE], return_all=True)
    linear = edm.coefficients(torch.tensor(s))[0] * noisy(s)
    guesses, wrong = [linear] + [blank] * K, [linear - truth] + [blank] * K
    scale = 3 * (every[-1] - truth).std()               # makes all errors of this row visible
    for k, guess in zip(config.running(s), every):
        guesses[k + 1], wrong[k + 1] = guess, (guess - truth) / scale
    rows += [sample_tiny.unit_scale(noisy(s), s), *guesses, truth, blank, *wrong, blank]
    names += [f"sigma {s:g}", "error"]
""")

py(r"""
heads = ["noisy image x", "linear guess", *(f"brick {k}" for k in range(K)), "truth x0"]
titled(sheet(torch.cat(rows), len(heads)), heads, names, 90)
""")

md(r"""
*Go along a row of pictures: each brick starts from the guess to its left and is asked to better it.
The row below shows what is still wrong: gray is right. The errors of the bricks are magnified, by one
factor for all bricks of a row. That of the linear guess is not magnified, so it looks paler than it is. Look for
errors that fade from brick to brick, and for the borders of patches and regions among them. The steps
are small, and one scene is not enough to weigh them, so we measure them.*

The loss of a brick is the mean squared error of its $F$. Since the linear guess has a loss of about
1 (a little more where noise is high, as section 2 showed), **a loss is roughly the share of the linear
guess's error that is left**. We measure it on landscapes that
were not trained on, for each subset of bricks. All subsets get the same images and the same noise,
so that their differences are not due to chance draws.
""")

py(r"""
def subset_losses(net, count):
    '''What `python assets/measure.py subsets` measures: a dictionary for every subset.'''
    with contextlib.redirect_stderr(io.StringIO()):             # its progress bar
        rows, lines = measure.subset_losses(net, edm, data, autocast, count)
    for row, skip in zip(rows, sample_tiny.covering_subsets(net.config)):
        mine = [line for line in lines if line["skipped"] == row["skipped"]]
        row["levels"] = [(line["sigma"], line["loss"]) for line in mine]
        row["skip"] = skip
    return rows


found = subset_losses(model, 64 if QUICK else 512)
whole = found[0]                                                # nothing is skipped
curves = {f"bricks {stays(row['skip'])}": list(zip(*row["levels"])) for row in found}
measure.plot(curves, "sigma", "loss", log_x=True)
""")

py(r"""
curves = {}
for row in found:
    pairs = zip(row["levels"], whole["levels"])
    rise = [100 * (one / all_ - 1) for (_, one), (_, all_) in pairs]
    curves[f"bricks {stays(row['skip'])}"] = [s for s, _ in row["levels"]], rise
measure.plot(curves, "sigma", "rise of the loss in percent", log_x=True)
""")

py(r"""
lines = []
for row in found[1:]:
    rises = [(one / all_, s) for (s, one), (_, all_) in zip(row["levels"], whole["levels"])]
    most, where = max(rises)
    total = row["loss"] / whole["loss"] - 1
    lines.append([str(list(row["skip"])), f"{row['loss']:.4f}", f"{total:+.1%}",
                  f"{most - 1:+.0%} at sigma {where:.2g}"])
head = f"loss (all bricks: {whole['loss']:.4f})"
table(["left out", head, "rise over all levels", "largest rise"], lines)
""")

md(r"""
*The first plot rises at both ends: where noise is high the scene cannot be known, and where it is low
there is so little left to correct that each small error weighs more. The second plot is the figure to
remember. A curve is named by the bricks that stay, and its height
is what the missing ones were worth there. A curve at zero means that nothing is lost at that noise level, because none
of the missing bricks works there or because the others do as well. Where a curve is high, its bricks
are needed. The table names the highest point of each.*
""")

py(r"""
def verdict(k):
    '''A sentence on what brick k is worth, from the losses with and without it.'''
    row = next((row for row in found if row["skip"] == (k,)), None)
    if row is None:
        return f"Brick {k} cannot be left out, since no other brick works at some noise levels."
    rise = row["ratio"] - 1                             # in its own range
    worth = "helps a little" if rise > .01 else "brings next to nothing"
    worth = "matters" if rise > .05 else worth
    return f"Brick {k} {worth}: without it the loss in its noise range changes by {rise:+.1%}."


Text("**What the numbers say.** " + " ".join(map(verdict, range(K))))
""")

py("took(4)")

# ---------------------------------------------------------------------------------------
section("5")

md(r"""
## 5. How do bricks learn to stand alone?

*9 minutes.* If only the last brick were asked for the right answer, the others could hand on whatever
helps it, and no shortened stack would make sense. So **every brick is asked for the right answer**.
The paper's equation 6, with EDM's weight, is the mean squared error of $F$ over bricks and images:

$$L = \frac{1}{BK}\sum_{k}\sum_{i}
\Big\lVert F^{(k)}_i - \frac{x_{0,i} - c_{skip}\,x_i}{c_{out}}\Big\rVert^2 ,$$

where a sum runs over the images $i$ in the noise range of brick $k$, and the squared norm stands for the
mean over the numbers of an image. The code has three parts, which
its comments name.
""")

py("shipped(lego.Diffusion.loss)")

md(r"""
**Noise.** There is one noise level from each of $B$ equal parts of the distribution, in rising
order (`sigma_at` gives the level below which a share of the distribution lies). So the images in a brick's range are a *slice* of the batch, the same one in every step, and
no step is spent on images that a brick does not work on:
""")

py(r"""
practice = EDM(P_mean=-.8, P_std=1.4)           # the noise levels that train_tiny.py trains on
for k, rows in enumerate(practice.rows(config, 32)):
    print(f"brick {k} ({config.bricks[k]}) gets {rows.stop - rows.start} of 32 images")
fractions = train_tiny.default_fractions(config)
for k, spec in enumerate(config.bricks):
    count = (SIDE // spec.region) ** 2
    chosen, _ = lego.pick_regions(spec, fractions[k], SIDE, SIDE, torch.tensor([.3, .6]))
    print(f"brick {k} trains on {len(chosen)} of its {count} regions in a step")
""")

md(r"""
**Run.** A brick need not train on all of its regions in every step (the paper's figure 3). Outside of
the chosen ones the next brick meets an older $z$. And for a share of the images a brick's result is
`hidden` from the later ones (*ours*), so that they learn to do without it.

**Compare.** The error of each brick is taken where it ran, and all errors are added up. One fact is
easy to check: an untrained stack puts out 0, so its loss is the mean square of the target.
""")

py(r"""
s, x = torch.full((8,), .5), x0 + .5 * eps
c_skip, c_out, *_ = edm.coefficients(torch.tensor(.5))
with torch.no_grad():
    _, each, _ = edm.loss(fresh, x0, labels, sigma=s, noise=eps)
by_hand = ((x0 - c_skip * x) / c_out).square().mean()
print(f"untrained: {each.nanmean():.6f}, by hand: {by_hand:.6f}")
assert torch.allclose(each.nanmean(), by_hand)
""")

md(r"""
Now we train for a few minutes, from nothing, with the same bricks at half the width. The two cells
are the core of `train_tiny.py`. Its optimizers are AdamW and, for the matrices inside the blocks,
Muon, which needs fewer steps. Pictures are drawn with a running average of the weights. `label_drop`
hides the class of some images, so that the network learns to do without it (see the appendix).
""")

py(r"""
def learn(net, optimizers, step, **settings):
    '''One step on 32 images; the losses (32, K) of every brick.'''
    images, y = data.batch(0, step, 32)
    with autocast():
        loss, each, _ = practice.loss(net, images, y, shuffle=False, label_drop=.1,
                                      generator=generator(step), **settings)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return each
""")

py(r"""
def fit(net, steps, watch, **settings):
    '''Train `net`; the average of its weights.'''
    average, optimizers = copy.deepcopy(net), train_tiny.make_optimizers(net, 4e-3)
    for step in range(steps):
        rate = 4e-3 * min(1, (step + 1) / 20, (1 - step / steps) / .4)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        watch(step, learn(net, optimizers, step, **settings), average)
        new = .5 ** (1 / max(1, .05 * step))                    # half-life: a twentieth
        for mean, p in zip(average.parameters(), net.parameters()):
            mean.data.lerp_(p.data, 1 - new)
    return average
""")

py(r"""
BUDGET, history, pictures = 8 if QUICK else 300, [], []


def watch(step, each, average):
    history.append(each.nanmean(0).tolist())
    if step % (BUDGET // 4) == 0:
        pictures.append(samples(average, steps=min(STEPS, 9)))


def half(**changes):
    torch.manual_seed(0)                        # the same first weights for both nets
    return Lego(replace(config, width=config.width // 2, heads=config.heads // 2, **changes))
""")

py(r"""
began = time.time()
settings = dict(region_fraction=fractions, brick_drop=.2)
each_asked = fit(half(), BUDGET, watch, **settings)
pictures.append(samples(each_asked, steps=min(STEPS, 9)))
print(f"{BUDGET} steps of 32 images in {time.time() - began:.0f} s")
smooth = [np.mean(history[max(0, i - 19):i + 1], 0) for i in range(BUDGET)]
steps = list(range(BUDGET // 15, BUDGET, max(1, BUDGET // 50)))
curves = {f"brick {k}": (steps, [smooth[i][k] for i in steps]) for k in range(K)}
measure.plot(curves, "step", "loss, mean of 20 steps")
""")

py(r"""
titled(sheet(torch.cat(pictures), 8, 2), rows=[
    "at the start", "after a quarter", "half", "three quarters", "the end"])
""")

md(r"""
*At the start the network puts out 0, so all it can do is the linear guess, and that leaves noise. Then
see in which order colours, the horizon, ridges and suns appear. All bricks learn from the first step
on. So short a run leaves blocks and specks, which more training removes. Do not compare the curves of two bricks with each other: they have different noise ranges, and some levels
are harder than others. The pretrained weights have seen many more images, at twice the width.*

**Is it needed to ask every brick?** We train the same net once more, on the same images and the same
noise, but ask only the last brick that works at a level (`supervise_all=False`). Now gradients must
flow back through $z$ (`detach=False`), since the other bricks would learn nothing otherwise. Both nets hide results from later bricks for a share of the images, so they differ
only in whom is asked and in where gradients flow. Then we leave bricks out of both.
""")

py(r"""
last_asked = fit(half(detach=False), BUDGET, lambda *_: None, supervise_all=False, **settings)
rivals = {"every brick asked": each_asked, "last brick asked": last_asked}
judged = {name: subset_losses(net, 64 if QUICK else 256) for name, net in rivals.items()}
lines = []
for one, other in zip(*judged.values()):
    lines.append([stays(one["skip"]), f"{one['loss']:.3f}", f"{other['loss']:.3f}"])
table(["bricks that run", *(f"loss, {name}" for name in rivals)], lines)
""")

py(r"""
fewest = min(found, key=lambda row: row["gflops"])["skip"]         # the cheapest subset
rows, names = [], []
for name, net in rivals.items():
    for skip in ((), fewest):
        rows.append(samples(net, 8, skip=skip))
        names.append(f"{name.split()[0]}, bricks {stays(skip)}")
titled(sheet(torch.cat(rows), 8, 2), rows=names)
""")

py(r"""
def rise(rows):
    '''By what factor the loss grows with the cheapest subset.'''
    by_skip = {row["skip"]: row["loss"] for row in rows}
    return by_skip[fewest] / by_skip[()]


every_one, last_one = map(rise, judged.values())
entire = {name: rows[0]["loss"] for name, rows in judged.items()}
better = min(entire, key=entire.get)
low, high = (f"{loss:.3f}" for loss in sorted(entire.values()))
told = f"both nets have the loss {low}" if low == high else (
    f"the net with \"{better}\" has the lower loss ({low} against {high})")
Text(f"**What came out.** With the bricks {stays(fewest)} alone, the loss is {every_one:.2f} times "
     f"that of the whole stack if every brick was asked, and {last_one:.2f} times if only the "
     f"last one was. With all bricks running, {told}. "
     f"This is one seed and {BUDGET} steps.")
""")

md(r"""
*The four rows are the figure to remember. Rows 1 and 2 come from the net that asked every brick, rows
3 and 4 from the one that asked the last, and both start from the same noise. Compare row 2 with row
4, and look at the lower lines of the table: a brick that was never asked for a picture hands out
something else when it has to be the last. Where a single brick runs, at high noise, it is the last in
both nets, so a rough light and dark survives in both. Asking every brick may have a price, since each brick also has to serve itself and not only the last. The
first line of the table would show it; if its two numbers agree, this run shows none.*
""")

py("took(5)")

# ---------------------------------------------------------------------------------------
section("6")

md(r"""
## 6. What may be skipped, and what does that save?

*7 minutes.* A skipped brick costs nothing, so the question is what each operation buys. `skip` is a
set of bricks, or a function of the *progress* of sampling, which is 0 at pure noise and 1 at the
end. Before the first step `schedule` checks that some brick is left at each noise level:
""")

py("shipped(lego.Diffusion.schedule)")

py(r"""
impossible = next((k for k in range(K) if (k,) not in subsets), None)
if impossible is not None:
    try:
        samples(model, 1, skip=[impossible])
    except ValueError as error:
        print("ValueError:", error)
""")

md(r"""
**Subsets.** We compare the loss of every subset (section 4) with its cost, which is the number of
floating-point operations for one whole picture. Torch counts them.
""")

py(r"""
points = {f"bricks {stays(row['skip'])}": ([row["gflops"]], [row["loss"]]) for row in found}
measure.plot(points, "GFLOPs for a picture", "loss", join=False)
""")

md(r"""
*A point is good if no other one lies both to its left and below it. The points that are not good in
this sense are subsets that nobody should use.*
""")

py(r"""
def beaten(row):
    '''Whether another subset is at least as cheap and at least as good.'''
    better = [one for one in found if one["gflops"] <= row["gflops"] and one["loss"] <= row["loss"]]
    return len(better) > 1


good = [row for row in found if not beaten(row)]
lines = [f"bricks {stays(row['skip'])} ({row['gflops']:.1f} GFLOPs, loss {row['loss']:.4f})"
         for row in sorted(good, key=lambda row: row["gflops"])]
Text("**Worth using**, from cheap to costly: " + "; ".join(lines) + ".")
""")

md(r"""
**Schedules.** The paper skips one brick, the last of the stack, during a share $t_{break}$ of the
steps. It has two directions. A brick for details can be left out at the *noisy* end, and a brick for
the whole image at the *clean* end. We try both with our last brick. Only those steps count in which
it would have worked at all.

A loss cannot judge a schedule, since the steps build on each other. So we draw pictures, and
measure their *distance* from true landscapes: the sliced Wasserstein distance (Karras et al. 2018),
which compares small patches of both sets of pictures. We take its finest level, since the last brick
works on details. All schedules start from the same noise. A second lot of true landscapes tells how
small a distance can be. Four parts of the pictures tell how much of a difference is chance.
""")

py(r"""
COUNT = 8 if QUICK else 96                      # pictures of every schedule
others = [data.draw(2 ** 32 + 5 + i, range(COUNT), SIDE, SIDE)[0] for i in range(2)]


def fine(images, true):
    return measure.distances(images, true)[0]


def distance(skip):
    '''The finest distance of COUNT pictures, and those of four parts of them.'''
    images = train_tiny.to_bytes(samples(model, COUNT, skip=skip))
    parts = [fine(images[i::4], others[0][i::4]) for i in range(4)]
    return fine(images, others[0]), parts
""")

py(r"""
def gflops(skip=lambda progress: ()):
    '''The operations of a picture under a schedule, in units of a billion.'''
    walk = edm.evaluations(STEPS)
    return sum(sum(model.flops(SIDE, SIDE, skip(i / STEPS), s)) for i, s in walk) / 1e9


DROPPED = next(k for k in reversed(range(K)) if (k,) in subsets)
works = sorted({i for i, s in edm.evaluations(STEPS) if DROPPED in config.running(s)})


def t_break(share, noisy_end):
    '''Skip the last brick in this share of the steps in which it works.'''
    n = round(share * len(works))
    steps = works[:n] if noisy_end else works[len(works) - n:]
    return lambda progress: [DROPPED] if round(progress * STEPS) in steps else []
""")

py(r"""
shares = [0, .5, 1] if QUICK else [0, .25, .5, .75, 1]
ends = {"skipped at the noisy end": True, "skipped at the clean end": False}
nothing, always = distance(t_break(0, True)), distance(t_break(1, True))    # both ways the same
measured_at = {}
for name, noisy_end in ends.items():
    between = [distance(t_break(share, noisy_end)) for share in shares[1:-1]]
    measured_at[name] = [nothing, *between, always]
curves = {name: (shares, [far for far, _ in line]) for name, line in measured_at.items()}
measure.plot(curves, "share of its steps", "finest distance")
""")

py(r"""
early, late = (np.mean([far for far, _ in line[1:-1]]) for line in measured_at.values())
by_part = [np.mean([parts for _, parts in line[1:-1]], 0) for line in measured_at.values()]
apart = by_part[0] - by_part[1]                 # noisy end minus clean end, in each part
chance = 2 * apart.std(ddof=1) / 2              # twice the standard error of their mean
cheap = "clean" if apart.mean() > 0 else "noisy"
told = f"so the {cheap} end is the better place to skip it" if abs(apart.mean()) > chance else (
    "which is too little to tell which end is the better one")
saved = 1 - gflops(t_break(1, True)) / gflops()
floor, none, all_ = fine(others[1], others[0]), nothing[0], always[0]
""")

py(r"""
points = {}
for row in found:                               # the subsets, in all steps
    far, _ = nothing if not row["skip"] else distance(row["skip"])
    cost = gflops(lambda progress: row["skip"])
    points[f"bricks {stays(row['skip'])}"] = [cost], [far]
for name, line in measured_at.items():          # the schedules, without their ends
    costs = [gflops(t_break(share, ends[name])) for share in shares[1:-1]]
    points[f"brick {DROPPED} {name}"] = costs, [far for far, _ in line[1:-1]]
measure.plot(points, "GFLOPs for a picture", "finest distance", join=False)
""")

py(r"""
Text(f"**What came out** for brick {DROPPED} ({config.bricks[DROPPED]}), with {COUNT} pictures of each "
     f"schedule. True landscapes have the distance {floor:.1f} from each other. The whole stack "
     f"has {none:.1f}, and {all_:.1f} if brick {DROPPED} never runs, which saves {saved:.0%} of the "
     f"operations. In between, skipping it at the noisy end gives {early:.1f} on average, and at "
     f"the clean end {late:.1f}. In four parts of the pictures the difference is "
     f"{apart.mean():+.1f} on average, give or take {chance:.1f}, {told}.")
""")

md(r"""
*The horizontal axis of the first plot is $t_{break}$, from the whole stack at 0 to a stack without its last brick at 1.
The paper leaves out a brick for details at the noisy end. Where the two curves lie apart, the order may
matter, but only if the sentence above says that the difference is more than chance. If the whole stack is as near to true landscapes as these are to each
other, that does not mean that its pictures are perfect: with so few pictures this measure sees no finer. The smaller the distance, the more the finest details look like true ones. All of it is
measured with few pictures of one set of weights, so small differences mean nothing.*

*The second plot is the figure to remember: every subset and every schedule, by what it costs and by how
far its pictures are from true ones. Left is cheaper and down is better. What a cheap point loses
against the whole stack is the price of skipping.*

**The line to beat** is a DiT of the same width: a stack of one brick that sees the whole image and
runs in full at every step. Its training takes longer than this notebook. If its results are there, they
come from these two commands, which the project ran beforehand:

    python assets/measure.py race --log assets/race.csv RUN...
    python assets/measure.py compare --log assets/curve.csv CASE...
""")

py(r"""
def stored(name):
    '''The lines of a log of assets/measure.py, or none.'''
    path = Path("assets", name)
    if not path.exists():
        print(f"{path} is not here, so what it would show is left out")
    return measure.read_log(path) if path.exists() else []


NAMES = {"tiny": "this stack", "dit-2": "DiT, patches of 2", "dit-4": "DiT, patches of 4"}
""")

py(r"""
race = [line for line in stored("race.csv") if line["data"] == "landscapes"]
curves = {}
for (kind,), lines in measure.groups(race, "kind").items():
    curves[NAMES.get(kind, kind)] = [[float(line[axis]) for line in lines] for axis in ("share", "last")]
if race:
    display(measure.plot(curves, "share of the training time", "held-out loss", join=False))
for name, (shares, losses) in curves.items():
    ends = [loss for share, loss in zip(shares, losses) if share == 1]
    print(f"{name}: {np.mean(ends):.4f} at the end, by seed", *(f"{loss:.4f}" for loss in ends))
""")

py(r"""
def family(case):
    '''Which points of the figure a case belongs to.'''
    if case.startswith("dit"):
        return "DiT of the same width"
    if "auto" in case:
        return "LEGO, --skip auto"
    if "@" in case:
        return "LEGO, skipped in some steps"
    return "LEGO, skipped in all steps" if "--skip" in case else "LEGO, whole"


cases, points = {}, {}                  # a case: its GFLOPs, and its distance for every seed
for line in stored("curve.csv"):
    if line["case"] != "other images":
        case = cases.setdefault(measure.any_seed(line["case"]), (float(line["gflops"]), []))
        case[1].append(float(line["fine"]))
for name, (cost, far) in cases.items():
    xs, ys = points.setdefault(family(name), ([], []))
    xs.append(cost)
    ys.append(np.mean(far))
""")

py(r"""
if cases:
    display(measure.plot(points, "GFLOPs for a picture", "finest distance", join=False))
for name, (cost, far) in sorted(cases.items(), key=lambda case: case[1]):
    print(f"{cost:>6.1f} GFLOPs, distance {np.mean(far):.1f}, by seed", *(f"{x:.1f}" for x in far), name)
""")

py(r"""
ours = [case for name, case in cases.items() if "dit" not in name]
lines = []
for name in [name for name in cases if "dit" in name]:
    cost, far = cases[name]
    wins = sum(one < cost and np.mean(other) < np.mean(far) for one, other in ours)
    lines.append(f"`{name}` ({cost:.1f} GFLOPs, distance {np.mean(far):.1f}) is beaten in both by "
                 f"{wins} of {len(ours)} cases of LEGO")
Text("**Against DiT**: " + ("; ".join(lines) or "there are no results to compare with") + ".")
""")

md(r"""
*The first of these figures shows the loss while the networks train, where 1 is the end of the same
training time for all. (It was shorter than that of the weights of section 4.) Each was trained with several
seeds, and every seed has its points. Read the second figure as the one before. In the list, `tiny` is our
stack, `3@0.67-1` leaves brick 3 out from progress 0.67 to 1, and `auto` leaves bricks out where the error
of the picture hardly grows. (The distances come from another number of pictures, so they cannot be compared with
those above.) Only points that lie below and to the left of a DiT beat it. Such a distance does not
see everything that an eye sees, and training has its chance as well.*
""")

py("took(6)")

# ---------------------------------------------------------------------------------------
section("7")

md(r"""
## 7. How does a network for small pictures draw a panorama?

*6 minutes.* Regions tile any canvas, so a brick can run on a larger one without any change. But no
region is larger than a training image, so nothing tells two regions side by side about each other.
We try it on a canvas four times as wide, in one run from noise to picture, with the grid of regions in
place.
""")

py(r"""
@torch.no_grad()
def in_place(n, height, width):
    '''n pictures by one walk over the whole canvas, and the grid stays where it is.'''
    noise = [torch.randn(3, height, width, generator=generator(0, i)) for i in range(n)]
    classes, levels = torch.arange(n) % config.classes, edm.levels(STEPS)

    def guess(step, x, sigma):
        return edm.estimate(model, x, sigma, classes).clamp(-1, 1)

    with autocast():
        *_, x = lego.walk(levels[0] * torch.stack(noise), levels, edm.sampler, guess, noise=None)
    return x
""")

md(r"""
The remedy (*ours*) is to move the grid: in every step the canvas turns sideways by some pixels, so the
borders of regions are never in one place for long. To `sample`, this is the ordinary case:
""")

py("shipped(lego.Diffusion.sample)")

py(r"""
WIDE = 4 * SIDE
n = 2 if QUICK else 8
fixed, moving = in_place(n, SIDE, WIDE), samples(model, n, (SIDE, WIDE))
true = data.draw(2 ** 32 + 9, range(n), SIDE, WIDE)[0]
names = ["true", "grid in place", "grid moves"]
for i in range(2):                              # two scenes
    rows = torch.stack([train_tiny.to_float(true)[i], fixed[i], moving[i]])
    display(titled(sheet(rows, 1, 4), rows=names, left=110))
""")

py(r"""
def seam(images):
    '''How much stronger edges are at the borders of large regions than elsewhere, as
    against true scenes; 1 is seamless.'''
    return measure.seam_ratio(train_tiny.to_bytes(images), true, SIDE, axis=2)


Text(f"**What came out**, for {n} panoramas. With the grid in place, neighbouring pixels differ "
     f"{seam(fixed):.2f} times as much across the borders of regions as they do elsewhere, "
     f"relative to true scenes. With the moving grid the factor is {seam(moving):.2f}. "
     "(It is 1 for true scenes. Below 1 the place is smoother than others.)")
""")

md(r"""
*This is the figure to remember. With the grid in place, every stretch as wide as a training image is
a scene of its own, which breaks off at its border. With the moving grid the ridges run on.*

*Look also at the suns. The program that draws the true scenes puts one into every two heights of
width, so a true panorama of four heights has two. The network never saw more than one height at a
time. It cannot count, so a panorama of its own may have any number of suns and moons, and neighbouring
places may disagree on the light. Moving the grid heals borders, and it does not plan a scene.*

**Higher resolution** is another problem: a scene twice as high must not become two scenes. So
`sample` draws the scene at the training size, enlarges it, adds a little noise and takes that noise
away again while the grid moves both ways. Does this add the right detail? We compare with true
scenes of the same size, and with an enlargement alone. True scenes have sharp edges and smooth
areas, so two numbers tell most: how large the steps between neighbouring pixels are at *edges* (the
largest hundredth of all steps) and in *smooth areas* (the lowest nine tenths).
""")

py(r"""
def steps_of(images):
    '''Mean steps between neighbouring pixels, at edges and in smooth areas.'''
    pixels = train_tiny.to_bytes(images).astype(int)
    steps = [np.abs(np.diff(pixels, axis=axis)).ravel() for axis in (1, 2)]
    steps = np.sort(np.concatenate(steps))
    edges, smooth = steps[-len(steps) // 100:], steps[:len(steps) * 9 // 10]
    return np.array([edges.mean(), smooth.mean()])


def enlarge(images, side):
    '''Bicubic, as `sample` does it before it refines.'''
    return torch.nn.functional.interpolate(images, (side, side), mode="bicubic", antialias=True)
""")

py(r"""
n, sides = 4 if QUICK else 8, (SIDE, 2 * SIDE, 4 * SIDE)
small, rows, lines = samples(model, n), [], []
for side in sides:
    refined = small if side == SIDE else samples(model, n, (side, side))
    scenes = train_tiny.to_float(data.draw(2 ** 32 + 9, range(8 * n), side, side)[0])
    only = enlarge(small, side)
    for name, images in (("only enlarged", only), ("refined", refined)):
        edges, smooth = steps_of(images) / steps_of(scenes)
        lines.append([f"{side}", name, f"{edges:.0%}", f"{smooth:.0%}"])
    rows.append([only, refined, scenes])
table(["side", "", "edges, of true scenes", "steps in smooth areas, of true scenes"], lines)
""")

py(r"""
parts = []
for images, side in zip(rows, sides):
    times = sides[-1] // side
    for part in images:                         # number 1 is the same scene at three sizes
        parts.append(part[1:2].repeat_interleave(times, 2).repeat_interleave(times, 3))
names = [f"drawn at {side} pixels" for side in sides]
heads = ["only enlarged", "refined", "a true scene"]
titled(sheet(torch.cat(parts), 3, 2), heads, names)
""")

md(r"""
*Each row is shown at the same size, so pixels shrink from row to row. Compare the middle column with
the left one, at the edges of ridges: this is what refining adds. Then compare it with the right one,
which is another scene, drawn by the program. Edges are soft where their number in the table lies
below 100%. For smooth areas compare "refined" with "only enlarged" of the same size, and not with 100%, since the
blurred edges of an enlargement count among them. What refining adds there are streaks in what should be
an even sky, and the network made them up. It never saw a scene at this resolution, so it looks for details
of the size that it knows. The farther a canvas is from the size in training, the more it is an
enlargement with texture, and the less a scene with new things in it.*
""")

py("took(7)")

# ---------------------------------------------------------------------------------------
section("8")

md(r"""
## 8. Can you build it yourself?

Each exercise is a cell to change. Run it again, and its last line says "not yet" or "right". Solutions
are folded away below each cell. The number of the section that an exercise belongs to comes first.
""")

py(r"""
def check(is_right):
    '''Say whether a solution is right. An error in it means: not yet.'''
    try:
        print("right" if is_right() else "not yet")
    except Exception as error:
        print("not yet:", repr(error))
""")

md(r"""
**Section 2: write Euler's sampler.** It follows the slope at the start of the step all the way. Return $x$ at
the noise level `sigma_next`. `denoise(x, sigma)` is the guess of $x_0$.
""")

py(r"""
def my_euler(x, sigma, sigma_next, denoise, **_):
    return x                                            # change this


def draws_the_same():
    def guess(x, sigma):
        return x / (1 + sigma ** 2)

    x, steps = torch.linspace(-2, 2, 9), [(3., 1.), (1., .2), (.2, 0.)]
    return all(torch.allclose(my_euler(x, *step, guess), lego.euler(x, *step, guess))
               for step in steps)


check(draws_the_same)
""")

md(r"""
<details><summary>Solution</summary>

```python
def my_euler(x, sigma, sigma_next, denoise, **_):
    slope = (x - denoise(x, sigma)) / sigma
    return x + (sigma_next - sigma) * slope
```

To draw with it, add it to the samplers: `lego.SAMPLERS["mine"] = my_euler`, and then
`samples(model, sampler="mine")`.
</details>
""")

md(r"""
**Section 3: make a mixer.** Attention is one way to let the tokens of a region know of each other.
A plain average is a cheaper one. Let `mix` give every token `self.proj` of the mean of all
tokens of its region. Its argument `h` has the shape $(B, R, N, D)$, and so has its result.
""")

py(r"""
class Average(lego.Block):
    def mix(self, h):
        return h                                        # change this


def mixes_regions_apart():
    block, h = Average(config), torch.randn(2, 3, 16, config.width)
    mean = torch.stack([h[:, r].mean(1, keepdim=True) for r in range(3)], 1)
    right = torch.allclose(block.mix(h), block.proj(mean).expand(h.shape), atol=1e-5)
    return right and Lego(config, block=Average)(x0, torch.zeros(8)).shape == x0.shape


check(mixes_regions_apart)
""")

md(r"""
<details><summary>Solution</summary>

```python
class Average(lego.Block):
    def mix(self, h):
        mean = h.mean(2, keepdim=True)
        return self.proj(mean).expand(h.shape)
```

Is it any good? `train_tiny.main(["--minutes", "2"], block=Average)` trains a stack of it.
</details>
""")

md(r"""
**Section 4: write your own order of bricks.** The stack of this notebook goes from large patches to small ones. The paper's *progressive growth* goes the other way: small regions first, the whole image
last. Write such a stack of three bricks or more whose regions never shrink from one brick to the
next, whose first region is smaller than its last, and in which **any one** brick can be left out.
""")

py(r"""
mine = "32/4x4 16/2x2"                                  # change this


def grows_and_can_be_shortened():
    stack = LegoConfig.parse(mine, width=64, heads=2)
    regions = [spec.region for spec in stack.bricks]
    free = sample_tiny.covering_subsets(stack)
    return (len(regions) > 2 and regions == sorted(regions) and regions[0] < regions[-1]
            and all((k,) in free for k in range(len(regions))))


check(grows_and_can_be_shortened)
""")

md(r"""
<details><summary>Solution</summary>

`mine = "8/2x2 16/4x2 32/4x4"` is one: its bricks work at all noise levels, so any two of them cover
them. With noise ranges, each level needs two bricks at least, as in
`mine = "16/2x3@:0.4 32/4x4@:2 32/4x4@0.1: 32/4x2"`. Train it by
`python train_tiny.py --bricks "..."` and compare the loss.
</details>
""")

md(r"""
**Section 5: add a noise range.** A batch of 32 holds its images in rising order of noise. Give the
second brick of this stack a noise range, so that it trains on exactly the 16 images with the lowest
noise, and leave the first as it is. `practice.sigma_at(q)` is the level below which a share `q` of the
training levels lies.
""")

py(r"""
mine = "32/4x6 16/2x3"                                  # change this


def has_the_lower_half():
    stack = LegoConfig.parse(mine, width=64, heads=2)
    first, second = practice.rows(stack, 32)
    return (first, second) == (slice(0, 32), slice(0, 16))


check(has_the_lower_half)
""")

md(r"""
<details><summary>Solution</summary>

`practice.sigma_at(torch.tensor(.5))` is $e^{-0.8} \approx 0.45$, the median of the training
levels. So `mine = "32/4x6 16/2x3@:0.45"`. A training step now spends half as much on the second brick.
</details>
""")

md(r"""
**Section 6: find the best schedule under a budget.** Write `skip(progress)`, the bricks to leave out
when so much of the walk is done, such that a picture takes no more than 60% of the operations of
the whole stack. `harm` is what to keep low: the mean rise of the loss (section 4) over all evaluations
of the walk. You are right if you come within a hundredth of the best schedule that changes its bricks
once.
""")

py(r"""
tables = {row["skip"]: list(zip(*row["levels"])) for row in found}
STEPS_6, walk = 18, edm.evaluations(18)


def loss_at(skip, sigma):
    '''The loss of a subset at a noise level, read off the curve of section 4.'''
    return np.interp(math.log(sigma), np.log(tables[skip][0]), tables[skip][1])


def bill(skip):
    '''What a schedule costs, as a share of the whole stack, and its harm.'''
    chosen = [(tuple(sorted(skip(i / STEPS_6))), s) for i, s in walk]
    flops = sum(price[one, s] for one, s in chosen) / sum(price[(), s] for _, s in walk)
    return flops, np.mean([loss_at(one, s) / loss_at((), s) - 1 for one, s in chosen])


price = {}
for one, (_, s) in itertools.product(subsets, walk):
    price[one, s] = sum(model.flops(SIDE, SIDE, one, s))
""")

py(r"""
def skip(progress):
    return ()                                           # change this


def is_cheap_and_good():
    changes = itertools.product(subsets, range(STEPS_6), subsets)
    bills = [bill(lambda p: one if round(p * STEPS_6) < i else two) for one, i, two in changes]
    best = min(harm for flops, harm in bills if flops <= .6)
    flops, harm = bill(skip)
    print(f"yours takes {flops:.0%} and rises by {harm:.3f}, the best one rises by {best:.3f}")
    return flops <= .6 and harm <= best + .01


check(is_cheap_and_good)
""")

md(r"""
<details><summary>Solution</summary>

The best one depends on the weights, so let the machine look for it:

```python
changes = itertools.product(subsets, range(STEPS_6), subsets)


def schedule(one, i, two):
    return lambda progress: one if round(progress * STEPS_6) < i else two


cheap = [change for change in changes if bill(schedule(*change))[0] <= .6]
skip = schedule(*min(cheap, key=lambda change: bill(schedule(*change))[1]))
```

Where only one brick works, all subsets are the same. So the choice is about the later steps.
</details>
""")

md(r"""
**Section 7: move the grid.** In every step the grid moves by `across` pixels, and what counts is its
place within a region. Some shifts come back to the same few places, and their seams stay. Find one
of at least a third of a region that leads the grid through *every* place, and that is neither of the two that `sample` takes.
""")

py(r"""
across = SIDE // 2                                      # change this


def visits_every_place():
    places = {step * across % SIDE for step in range(SIDE)}
    print(f"{len(places)} of {SIDE} places")
    return len(places) == SIDE and across >= SIDE // 3 and across not in (11, 13)


check(visits_every_place)
""")

md(r"""
<details><summary>Solution</summary>

`across = 15`, or any other number that shares no divisor with the side. Which one is best?
Measure it: `seam` of section 7 is the judge, and the shifts stand in `lego.Diffusion.sample`.
</details>
""")

# ---------------------------------------------------------------------------------------
section("A")

md(r"""
## Appendix: for those who want more

**Is this the authors' network?** `LegoConfig.official` is the released network: enrichment by one
linear map, a brick replaces $z$, gradients flow through it, and coordinates are stretched over the
canvas. `lego.PRESETS` holds the stacks of the paper. The test suite has figures that were computed
with the authors' code, and they must be met to 2e-6:
""")

py(r"""
import test_lego
for size, *expected in test_lego.PARITY:
    test_lego.test_parity_with_the_released_network(size, *expected)
    print(f"three bricks on {size}x{size} pixels: all figures agree")
""")

md(r"""
**Is DDPM something else?** Ho et al. (2020) write $x_t = \sqrt{\bar\alpha_t}\,x_0 +
\sqrt{1 - \bar\alpha_t}\,\epsilon$ and let the network predict $\epsilon$. Divided by
$\sqrt{\bar\alpha_t}$, this is $x_0 + \sigma\epsilon$ again, with
$\sigma = \sqrt{(1 - \bar\alpha_t)/\bar\alpha_t}$. So `DDPM` in `lego.py` has its own coefficients
and noise levels, and shares the rest. Here our EDM network serves as a predictor of noise:
""")

py(r"""
class AsNoise(torch.nn.Module):
    '''eps = (x - x0_hat) / sigma, asked for at x_t = x / sqrt(1 + sigma^2).'''
    def forward(self, x_t, c_noise, labels=None, **_):
        sigma = (4 * c_noise).exp()
        x = x_t * (1 + sigma ** 2).sqrt().view(-1, 1, 1, 1)
        return [(x - edm.denoise(model, x, sigma, labels)) / sigma.view(-1, 1, 1, 1)]


ddpm, t = lego.DDPM(), torch.tensor([50, 200, 400, 600, 700, 800, 900, 950])
s = ddpm.sigmas[t].view(-1, 1, 1, 1)
with torch.no_grad():
    one = ddpm.denoise(AsNoise(), (x0 + s * eps) / (1 + s ** 2).sqrt(), t, labels)
    other = edm.denoise(model, x0 + s * eps, s.flatten(), labels)
print(f"largest difference of the two estimates: {(one - other).abs().max():.1e}")
assert torch.allclose(one, other, atol=1e-3)
""")

md(r"""
**Does it work on photographs?** `assets/cifar10.pt` was trained on a GPU; the README says how. Every
column asks for one class of CIFAR-10, and the scale of guidance is 1.5: the guess with the label is pushed
further away from the guess without it (Ho & Salimans 2022), which makes classes more marked.
""")

py(r"""
cifar = lego.load_checkpoint("assets/cifar10.pt")
print(cifar.config)
pictures = samples(cifar, 10 if QUICK else 30, guidance=1.5)
titled(sheet(pictures, 10, 3), cifar.info["classes"])
""")

md(r"""
*Look for the columns in which you would have told the class without its name. In the others the
colours and the light are those of a photograph, and things are not.*

**Where to go next.** `python train_tiny.py --dataset photos.zip` trains on your own images, and
`python train_tiny.py --help` lists the rest: other objectives, longer runs, how to resume. Checkpoints
hold tensors and plain data, never code (`lego.load_checkpoint`). To use bricks in a project of
your own, copy `lego.py`, which needs nothing but torch.
""")

py(r"""
minutes = [(now - then) / 60 for now, then in zip((time.time(), time.process_time()), STARTED)]
print("Part I took {:.1f} minutes, of which its processor worked {:.1f}".format(*minutes),
      f"({torch.get_num_threads()} thread)")
""")
