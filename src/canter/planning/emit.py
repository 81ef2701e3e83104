"""A plan written out row by row, so that anyone can check it without this code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from canter.errors import PlanError
from canter.files import replacing
from canter.planning.elastic import share_out
from canter.planning.plan import Plan

SCHEMA = pa.schema([("step", pa.int64()), ("micro_batch", pa.int32()), ("rank", pa.int32()), ("row", pa.int64())])


def write_plan(plan: Plan, path: str | Path, ranks: int = 1) -> None:
    """Parquet with the columns step, micro_batch (in the step), rank, row; one line an utterance, in plan order."""
    count = plan.windows.count
    if count is None:
        raise PlanError("an endless stream cannot be written out")
    before = 0
    with replacing(path) as fresh, pq.ParquetWriter(fresh, SCHEMA) as writer:
        for window in range(count):
            cut = plan.cut(window)
            batches = np.diff(cut.steps)
            number = np.arange(len(cut.batches) - 1) - np.repeat(cut.steps[:-1], batches)
            rank = np.zeros(len(number), np.int32)
            for step in range(len(cut)) if ranks > 1 else ():
                for r, share in enumerate(share_out(plan.step_seconds(window, step), ranks)):
                    rank[cut.steps[step] + np.array(share, np.int64)] = r
            size = np.diff(cut.batches)
            columns = [np.repeat(np.arange(len(cut)) + before, batches), number, rank]
            arrays = [*(np.repeat(column, size) for column in columns), cut.rows]
            writer.write_table(pa.table([pa.array(a, f.type) for a, f in zip(arrays, SCHEMA)], schema=SCHEMA))
            before += len(cut)
