"""Initializations: each module turns the statistics of a layer into `lora_A` and `lora_B`."""

from streamda.methods.input_factor import (
    BasisFactor,
    Factor,
    InputFactor,
    SpannedFactor,
    TokenFactor,
    prepare_basis_factor,
    prepare_input_factor,
    prepare_token_factor,
)
from streamda.methods.lora_da import solve_layer
from streamda.methods.solution import LayerSolution, SolveStatus

__all__ = [
    "BasisFactor",
    "Factor",
    "InputFactor",
    "LayerSolution",
    "SolveStatus",
    "SpannedFactor",
    "TokenFactor",
    "prepare_basis_factor",
    "prepare_input_factor",
    "prepare_token_factor",
    "solve_layer",
]
