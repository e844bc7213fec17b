"""The model types whose layers are reproduced."""

import cases_decoders
import cases_encoders

CASES = [*cases_decoders.DECODERS, *cases_encoders.ENCODERS]
SPLASH = [*cases_decoders.SPLASH, *cases_encoders.SPLASH]

__all__ = ["CASES", "SPLASH"]
