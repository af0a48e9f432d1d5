"""nbdev_test, which also compares the outputs that a notebook keeps with what its cells give.

python tests/notebooks.py [nbdev_test's options]        run and compare
python tests/notebooks.py --write [the same options]    run and keep the new outputs
"""

import json
import re
import sys
from itertools import zip_longest
from math import isclose
from pathlib import Path

import nbdev.test
import pandas as pd
from execnb.shell import CaptureShell

WRITE = "--write" in sys.argv
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
NO_CELL = "(nothing)"


class StaleOutputError(AssertionError):
    "A cell gives something else than the notebook keeps."


def plain_text(content):
    return content if isinstance(content, str) else "".join(content)


def shown(outputs):
    "What a reader sees, one text each: printed text and tables; of a picture, that it is one."
    texts = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stdout":
                texts.append(plain_text(output["text"]))
            continue
        data = output.get("data", {})
        kind = next((k for k in ("image/png", "text/html", "text/plain") if k in data), None)
        texts.append("a picture" if kind == "image/png" else plain_text(data.get(kind, "")))
    return [text.rstrip("\n") for text in texts]


def same(kept, new):
    "Equal up to the last digits of fractions, which differ between processors."
    if NUMBER.sub("#", kept) != NUMBER.sub("#", new):
        return False
    pairs = zip(NUMBER.findall(kept), NUMBER.findall(new), strict=True)
    return all(isclose(float(a), float(b), rel_tol=0.02, abs_tol=2e-3) for a, b in pairs)


def without_warnings(outputs):
    return [o for o in outputs if o.get("name") != "stderr"]


class KeepingShell(CaptureShell):
    "Runs a notebook's cells, then compares what they gave with what the file keeps, or keeps it."

    def __init__(self, path):
        super().__init__(path, mpl_format="png")
        self.path = Path(path)

    def run_all(self, notebook, exc_stop=False, preproc=lambda cell: False, **options):
        pd.reset_option("display.max_colwidth")  # another notebook of this process may have set it
        ran = []

        def skip(cell):
            skipped = preproc(cell)
            if not skipped and cell.cell_type == "code":
                ran.append(cell.id)
            return skipped

        super().run_all(notebook, exc_stop=exc_stop, preproc=skip, **options)
        new = {c.id: without_warnings(c.get("outputs", [])) for c in notebook.cells if c.id in ran}
        (self.write if WRITE else self.compare)(new)

    def compare(self, new):
        for cell in json.loads(self.path.read_text())["cells"]:
            if cell["id"] not in new:
                continue
            for kept, given in zip_longest(
                shown(cell["outputs"]), shown(new[cell["id"]]), fillvalue=NO_CELL
            ):
                if not same(kept, given):
                    raise StaleOutputError(
                        f"{self.path.name}, cell {cell['id']}: the notebook keeps\n{kept}\n"
                        f"and the cell gives\n{given}\n"
                        f"Keep it by python tests/notebooks.py --write --path nbs/{self.path.name}"
                    )

    def write(self, new):
        notebook = json.loads(self.path.read_text())
        for cell in notebook["cells"]:
            if cell["id"] in new:
                cell["outputs"] = json.loads(json.dumps(new[cell["id"]]))
                for output in cell["outputs"]:
                    output.pop("execution_count", None)
                    if output["output_type"] == "execute_result":
                        output["execution_count"] = None
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        self.path.write_text(text + "\n")

    def prettytb(self, fname=None):
        error = sys.exc_info()[1]
        return str(error) if isinstance(error, StaleOutputError) else super().prettytb(fname=fname)


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if a != "--write"]
    nbdev.test.CaptureShell = KeepingShell
    nbdev.test.nbdev_test()
