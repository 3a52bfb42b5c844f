"""finish.py EXECUTED.ipynb SOURCE.ipynb OUT.ipynb: merge neighbouring prints, drop the JPEG copies that
Pillow adds to every picture and the times of execution, and take the markdown cells of SOURCE."""
import sys
import nbformat

done, source = (nbformat.read(path, 4) for path in sys.argv[1:3])
for cell, fresh in zip(done.cells, source.cells, strict=True):
    if cell.cell_type == "markdown":
        cell.source = fresh.source
        continue
    assert cell.source == fresh.source, cell.source[:80]
    cell.metadata.pop("execution", None)
    merged = []
    for output in cell.outputs:
        if "data" in output:
            output.data.pop("image/jpeg", None)
        same = merged and output.output_type == merged[-1].output_type == "stream"
        if same and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    cell.outputs = merged
done.metadata = source.metadata
nbformat.write(done, sys.argv[3])
