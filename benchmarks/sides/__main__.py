"""`python -m benchmarks.sides NAME FOLDER NET JOB SETTINGS`: prepares a job of a library, then runs
it once for each line that comes in, and answers by seconds and results.
"""

import importlib
import json
import resource
import sys
import time
import traceback
from pathlib import Path

from benchmarks.sides import answers, given


def main() -> None:
    name, folder, net, job, settings = sys.argv[1:]
    out = answers()
    try:
        side = importlib.import_module(f"benchmarks.sides.{name}")
        if job == "known":
            out.tell(**side.known())
            return
        run = getattr(side, job)(given(Path(folder), name, net), **json.loads(settings))
        out.tell(ready=True)
        for _ in sys.stdin:
            start, work = time.perf_counter(), time.process_time()
            found = run()
            spent = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - work}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            out.tell(**spent, found=found, peak_mb=peak)
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())[:200]
        out.tell(error=f"{type(error).__name__}: {words}")


if __name__ == "__main__":
    main()
