"""run.py IN.ipynb OUT.ipynb: execute a notebook in IN's folder, as one clean run."""
import sys, pathlib, nbformat, nbclient
source, out = map(pathlib.Path, sys.argv[1:3])
nb = nbformat.read(source, 4)
client = nbclient.NotebookClient(nb, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(source.resolve().parent)}})
try:
    client.execute()
finally:
    for c in nb.cells: c.pop("id", None) if False else None
    nbformat.write(nb, out)
print("done", out)
