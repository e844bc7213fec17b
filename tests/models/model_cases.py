"""The model types whose layers are reproduced."""

from cases_decoders import DECODERS, SPLASH
from cases_encoders import ENCODERS

CASES = [*DECODERS, *ENCODERS]

__all__ = ["CASES", "SPLASH"]
