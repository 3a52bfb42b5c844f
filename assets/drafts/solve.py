"""Build a notebook with all exercises solved."""
import sys, nbformat
nb = nbformat.read(sys.argv[1], 4)
S = [("    return x                                            # change this", "    slope = (x - denoise(x, sigma)) / sigma\n    return x + (sigma_next - sigma) * slope"),
 ("        return h                                        # change this", "        mean = h.mean(2, keepdim=True)\n        return self.proj(mean).expand(h.shape)"),
 ('mine = "32/4x4 16/2x2"                                  # change this', 'mine = "16/2x3@:0.4 32/4x4@:2 32/4x4@0.1: 32/4x2"'),
 ('mine = "32/4x6 16/2x3"                                  # change this', 'mine = "32/4x6 16/2x3@:0.45"'),
 ("def skip(progress):\n    return ()                                           # change this", '''changes = itertools.product(subsets, range(STEPS_6), subsets)


def schedule(one, i, two):
    return lambda progress: one if round(progress * STEPS_6) < i else two


cheap = [change for change in changes if bill(schedule(*change))[0] <= .6]
skip = schedule(*min(cheap, key=lambda change: bill(schedule(*change))[1]))'''),
 ("across = SIDE // 2                                      # change this", "across = 15")]
for a, b in S:
    hits = [c for c in nb.cells if c.cell_type == "code" and a in c.source]
    assert len(hits) == 1, (a, len(hits))
    hits[0].source = hits[0].source.replace(a, b)
if len(sys.argv) > 3:   # stand-ins of the logs
    for c in nb.cells:
        c.source = c.source.replace('Path("assets", name)', 'Path("/tmp/stand", name)')
nbformat.write(nb, sys.argv[2])
