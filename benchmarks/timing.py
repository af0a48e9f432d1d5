"The clock of the benchmarks."

import time
from typing import Any, NamedTuple


class Timed(NamedTuple):
    "What a call returned, and its seconds."

    result: Any
    wall: float
    cpu: float


def timed(call, *args):
    wall = time.perf_counter()
    cpu = time.process_time()
    result = call(*args)
    return Timed(result, time.perf_counter() - wall, time.process_time() - cpu)
