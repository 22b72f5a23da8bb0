"""results.csv and results.json: every row of every cell as it was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import pandas as pd

from pbbench.records.cells import CellResult
from pbbench.records.rows import COLUMNS


def results(cells: Iterable[CellResult]) -> pd.DataFrame:
    """Columns as in ``records.rows.COLUMNS``. Integers stay integers and unknown stays None; a float that is not finite becomes
    None with a reason, so that JSON can hold it."""
    rows = []
    for row in (row for cell in cells for row in cell.rows):
        values = row.model_dump(mode="python")
        reasons = dict(row.reasons)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name], reasons[name] = None, f"the value was {value}"
        rows.append(values | {"reasons": reasons})
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def results_files(cells: Iterable[CellResult]) -> dict[str, bytes]:
    """File name → content."""
    rows = results(cells)
    reasons = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in rows["reasons"]]
    listed = json.dumps(rows.to_dict("records"), indent=1, ensure_ascii=False, allow_nan=False)
    table = rows.assign(reasons=reasons).to_csv(index=False, lineterminator="\n")
    return {"results.csv": table.encode(), "results.json": f"{listed}\n".encode()}
