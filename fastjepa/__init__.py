"""fastjepa: pretraining of vision encoders by predicting meaning instead of pixels.

Importing this package loads nothing else: take what you need from its parts, for example
`from fastjepa.masks import MultiBlockMasks`.
"""

__version__ = "0.1.0"
