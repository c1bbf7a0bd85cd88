from asgd_fast.schedule import AveragingKind

def next_scalars(
    step: float,
    lr: float,
    lambd: float,
    alpha: float,
    t0: float,
    average_every: float = 1.0,
    current: bool = False,
    averaging: AveragingKind = "mean",
) -> tuple[float, float]: ...
