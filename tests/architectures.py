"""
`python tests/architectures.py [TYPE …]`: what the kit does with each type of model.

Each type is checked in a process of its own, so that a crash is a row of the table and not its
end. Writes the page of the guide to stdout, progress and a summary to stderr; exits with 1 if
a check came out wrong or stopped with an error that is none of the kit's.
"""

import multiprocessing
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import architecture_checks
import jinja2
import transformers
from architecture_checks import CHECKS, TOLERANCE, Cell
from tiny_types import NOT_TINY, decoder_types

from finetune_kit.core import FineTuneError, choices
from finetune_kit.logs import quiet

PROCESSES = 2
SECONDS = 90  # for all checks of a type
TEMPLATE = Path(__file__).with_suffix(".md.j2")
NOT_COUNTED = ("adapted", "GGUF")  # no part of "passes every check"


def quiet_transformers():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def share_adapted(cells: dict[str, Cell], model_type: str) -> Cell:
    "How much LoRA reaches; only asked where LoRA and its merge are exact."
    if cells["merge"].kind != "ok":
        return Cell("not compared", "no exact merge")
    try:
        return Cell("ok", f"{architecture_checks.weights_adapted(model_type):.0%}")
    except FineTuneError as error:
        return Cell("refused", f"{type(error).__name__}: {error}")


def check_type(
    model_type: str,
    results: Connection,  # Where each (column, cell) goes as soon as it is there
):
    "All checks of a type, in the child process."
    quiet_transformers()
    cells = {}
    for column in CHECKS:
        cells[column] = architecture_checks.outcome(column, model_type)
        results.send((column, cells[column]))
        if column == "merge":
            results.send(("adapted", share_adapted(cells, model_type)))
    results.close()


COLUMNS = [*CHECKS]
COLUMNS.insert(COLUMNS.index("LoRA") + 1, "adapted")


@dataclass
class Child:
    "A process that checks a type."

    model_type: str
    process: Any
    cells: dict[str, Cell] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def finish(self, reason: str):
        "The check it was at, where it did not come to its end, is an error."
        self.process.join()
        missing = [column for column in COLUMNS if column not in self.cells]
        for column in missing:
            self.cells[column] = Cell("ERROR", reason)


def start_child(model_type: str) -> tuple[Connection, Child]:
    "The end to read its results from, and the process."
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check_type, args=(model_type, sender))
    process.start()
    sender.close()
    return receiver, Child(model_type, process)


def check_types(
    types: list[str],
    processes: int = PROCESSES,
    seconds: float = SECONDS,  # for each type
    on_row=lambda model_type, cells, seconds: None,  # Called with each type that is finished
) -> dict[str, dict[str, Cell]]:
    "Type → column → what came of it."
    waiting = list(types)
    running: dict[Connection, Child] = {}
    rows = {}
    while waiting or running:
        while waiting and len(running) < processes:
            receiver, child = start_child(waiting.pop(0))
            running[receiver] = child
        for receiver in wait(list(running), timeout=1):
            child = running[receiver]
            try:
                column, cell = receiver.recv()
                child.cells[column] = cell
            except EOFError:
                child.process.join()
                child.finish(f"the process ended with {child.process.exitcode}")
        for child in running.values():
            if child.seconds > seconds and len(child.cells) < len(COLUMNS):
                child.process.kill()
                child.finish(f"not finished after {seconds:g} s")
        finished = [r for r, child in running.items() if len(child.cells) == len(COLUMNS)]
        for receiver in finished:
            child = running.pop(receiver)
            child.process.join()
            rows[child.model_type] = child.cells
            on_row(child.model_type, child.cells, child.seconds)
    return {name: rows[name] for name in types}


# The page


SHORT = {"ok": "yes", "refused": "refused", "not compared": "–"}


def shown(cell: Cell) -> str:
    "A cell in the table."
    if cell.is_fault:
        return cell.kind
    return cell.text if cell.kind == "ok" and cell.text else SHORT[cell.kind]


def passes(cells: dict[str, Cell]) -> bool:
    "Whether a type passes every check."
    return all(cell.kind == "ok" for name, cell in cells.items() if name not in NOT_COUNTED)


def reason_without_names(cell: Cell, model_type: str) -> str:
    "Why the kit refuses: the first clause, the same for types of which it says the same."
    clause = cell.text.split(": ", 1)[1].split("; ")[0]
    return clause.replace(repr(model_type), "…").removeprefix(f"{model_type}: ").strip()


def reasons(rows) -> list[tuple[str, list[str], list[str]]]:
    "Reason, the columns that it is given in, and the types."
    columns = defaultdict(list)
    for model_type, cells in rows.items():
        for column, cell in cells.items():
            if cell.kind == "refused" and column not in NOT_COUNTED:
                columns[reason_without_names(cell, model_type), model_type].append(column)
    types = defaultdict(list)
    for (reason, model_type), names in columns.items():
        types[reason, tuple(names)].append(model_type)
    return [(reason, list(names), of_types) for (reason, names), of_types in types.items()]


def page(rows: dict[str, dict[str, Cell]]) -> str:
    "The page of the guide."
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        version=transformers.__version__,
        tolerance=f"{TOLERANCE:g}",
        columns=COLUMNS,
        rows=[(name, [shown(cells[column]) for column in COLUMNS]) for name, cells in rows.items()],
        n_full=sum(passes(cells) for cells in rows.values()),
        n_faults=len(faults(rows)),
        reasons=reasons(rows),
        left_out=NOT_TINY.items(),
    )


# The summary


def faults(rows) -> list[str]:
    "Each cell that is the kit's fault, in words."
    return [
        f"{model_type:20} {column:10} {cells[column]}"
        for model_type, cells in rows.items()
        for column in COLUMNS
        if cells[column].is_fault
    ]


def summary(rows) -> str:
    "How many types pass, how many are refused and what for, and every fault."
    n_full = sum(passes(cells) for cells in rows.values())
    lines = [f"{n_full} of {len(rows)} types pass every check"]
    for column in COLUMNS:
        kinds = [cells[column].kind for cells in rows.values()]
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds))]
        lines.append(f"{column:10} {', '.join(counts)}")
    return "\n".join([*lines, *faults(rows)])


def tell(model_type: str, cells: dict[str, Cell], seconds: float):
    "A line for a type."
    kinds = {kind: [c for c in COLUMNS if cells[c].kind == kind] for kind in ("WRONG", "ERROR")}
    named = [f"{kind} {', '.join(columns)}" for kind, columns in kinds.items() if columns]
    refused = [column for column in COLUMNS if cells[column].kind == "refused"]
    named += [f"refused {', '.join(refused)}"] if refused else []
    print(f"{model_type:24} {seconds:3.0f} s  {'; '.join(named)}", file=sys.stderr, flush=True)


def warm_up():
    "Import here what each child would import by itself."
    with quiet():
        for column in CHECKS:
            architecture_checks.outcome(column, "llama")


def main(types: list[str]) -> int:
    known = decoder_types()
    for name in types:
        if name not in known:
            print(f"type {choices(name, known)}", file=sys.stderr)
            return 2
    warm_up()
    rows = check_types(types or known, on_row=tell)
    print(summary(rows), file=sys.stderr)
    print(page(rows), end="")
    return 1 if faults(rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
