def next_scalars(
    step: float,
    lr: float,
    lambd: float,
    alpha: float,
    t0: float,
    average_every: float = 1.0,
    current: bool = False,
) -> tuple[float, float]: ...
