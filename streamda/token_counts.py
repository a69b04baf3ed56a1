"""How many tokens are few: when their statistics are sums all the same, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamda.config import RunConfig
from streamda.layers import LinearSpec, Targets
from streamda.panels import FLOAT32_BYTES
from streamda.solve_bytes import FLOAT64_BYTES
from streamda.solve_plan import ROWS_PER_INPUT, keeps_rows

TOKENS_PER_INPUT = 4
"""Below it an input moment is noisy: with as many tokens as inputs the smallest eigenvalues are near zero by chance."""


def makes_sums(config: RunConfig, dtype: torch.dtype) -> bool:
    """Whether statistics are sums however few tokens there are, beside those that are kept, which always are.

    Gradients of tokens that no moment counts have no rows in it; what a codec rounds is solved as it was rounded; and
    in bfloat16 rounding is as large as what tells tokens apart.
    """
    collect = config.collect
    return collect.token_mask != "attention" or collect.statistics_codec == "bitround" or dtype != torch.float32


def moment_bytes(config: RunConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Of each sum of an input moment: 8, which is float64, where a CPU computes in float32.

    A GPU has few units for float64; narrower activations are rounded by more than sums are, and so is what a codec
    rounds.
    """
    is_wide = device.type == "cpu" and dtype == torch.float32 and config.collect.statistics_codec != "bitround"
    return FLOAT64_BYTES if is_wide else FLOAT32_BYTES


def rank_deficient(targets: Targets, num_tokens: int, sums: bool, width: int) -> str | None:
    """A note where the tokens that enter the moments are few for the input dimensions.

    Args:
        targets: the adapted layers.
        num_tokens: that enter the moments.
        sums: whether sums are made in any case.
        width: of `moment_bytes`.
    """
    few: Sequence[str] = [spec.name for spec in targets.linears if TOKENS_PER_INPUT * spec.d_in > num_tokens]
    short = [spec for spec in targets.linears if spec.d_in > num_tokens]

    def is_summed(spec: LinearSpec) -> bool:
        few_rows = num_tokens < ROWS_PER_INPUT * spec.d_in
        return few_rows and (sums or not keeps_rows(num_tokens, spec.d_in, [spec.d_out]))

    summed = list(filter(is_summed, targets.linears)) if width == FLOAT32_BYTES else []
    rounding = (
        f"; {len(summed)} layers are solved from sums in float32, whose rounding may be most of what they get from so "
        "few, whatever their status says"
    )
    if short:
        what = (
            f"{num_tokens} tokens are fewer than the inputs of {len(short)} layers (such as {short[0].name}): what no "
            "token shows is left to the damping"
        )
    elif few:
        what = (
            f"{num_tokens} tokens are fewer than {TOKENS_PER_INPUT} for each input of {len(few)} layers (such as "
            f"{few[0]}): their input moments are noisy"
        )
    else:
        return None
    return f"{what}; more samples are better{rounding if summed else ''}"
