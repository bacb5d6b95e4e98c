"""Read and edit what a model computes: hidden states, attention rows, interventions on the visual tokens.

Layer numbers everywhere: layer 0 is the input of the first block, layer l is the output of block l, before the final
norm. Transformers' own last hidden state comes after that norm, so it is never used here. At the visual positions,
layer 0 is the projector's output (checked when a model is loaded).
"""

from workbench.capture.attention import attention
from workbench.capture.edit import edit
from workbench.capture.hidden_states import Activations, read
from workbench.capture.knockout import knockout

__all__ = ["Activations", "attention", "edit", "knockout", "read"]
