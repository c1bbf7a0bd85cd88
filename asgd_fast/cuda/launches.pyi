from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from asgd_fast._rows.rows import Rows

THREADS: int
N_ROWS_AT: int
N_CHUNKS_AT: int
CHUNK_AT: int
SETS_AT: int
JOB_AT: int
TICKET_AT: int
LOSS_SCALE_AT: int
FOUND_INF_AT: int
HEADER: int
PLACE_AT: int
SCALARS_AT: int
ROW: int
DEVICE_ROW: int
FIRST_BITS: int
TAIL_BITS: int
SET_SHIFT: int
MOST_SETS: int
NEG_ETA_AT: int
DECAY_AT: int
WEIGHT_DECAY_AT: int
FACTOR_AT: int
MU_AT: int
HOW_AT: int
SET: int
NO_AVERAGE: int
COPY: int
AVERAGE: int
SKIP: int
PHASES: int
HAS_WEIGHT_DECAY: int
LR_AT: int
LAMBD_AT: int
ALPHA_AT: int
T0_AT: int
EVERY_AT: int
EMA_DECAY_AT: int
POWER_AT: int
L2_AT: int
SIGN_AT: int
FLAGS_AT: int
DEVICE_SET: int
SCALARS_ARE_DOUBLE: int
LR_IS_FLOAT: int
LR_IS_DOUBLE: int
IS_CURRENT: int
UPDATE: int
SWAP: int
COPY_GRAD: int
KEEP: int
ASSIGN: int
PUT_AVERAGE: int
PUT_BACK: int

def row_words(device_scalars: bool) -> int: ...
def set_words(device_scalars: bool) -> int: ...
def keys_of(rows: Rows) -> list[int]: ...
def launch_kind(key: int) -> tuple[int, str, str, bool]: ...
def pack(
    rows: Rows,
    key: int,
    start: int,
    words: npt.NDArray[np.uint64],
    job: int,
    n_blocks: int,
    loss_scale: int = 0,
    found_inf: int = 0,
) -> tuple[int, int, int]: ...
def run(groups: list[tuple[Callable[[], Any], ...]], success: object) -> list[tuple[Any, ...]]: ...
