"""Reading and editing what a model computes: hidden states, attention rows, and interventions on the visual tokens.

Layer numbers, everywhere: 0 is what the first block receives, l is the output of block l, before the final norm.
transformers' own last hidden state comes after that norm, so it is never used here. At the visual positions layer 0 is
the projector's output (checked when a model is loaded).
"""

from workbench.capture.attention import attention
from workbench.capture.edit import edit
from workbench.capture.hidden_states import Activations, read
from workbench.capture.knockout import knockout

__all__ = ["Activations", "attention", "edit", "knockout", "read"]
