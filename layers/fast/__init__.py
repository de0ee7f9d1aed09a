"""The fast path: what `Backbone.plain` computes, with less work. Nothing here is needed to understand the paper.

The decoder is causal and the prompt holds nothing that is trained. So a prompt's keys and values do not depend on
the patches behind it, and need no gradient. Each layer keeps them in one buffer of slots,

    slot   0            P0             P0 + n           P0 + n + L
           [   prefix   |  statistics  |    patches     ]
    run    once a run     once a step    once a step
    grad   no             no             yes

and attention reads views of it. The statistics `[M, n]` are padded on the right: a mask hides the padding from the
patches, whose positions count real tokens alone.

The contract, which tests/models/test_contracts.py holds:

- Forecasts and the gradients of every trained tensor equal the plain path's (float32: 1e-5 of the largest value).
- The backbone is causal and sees all that comes before a token. `models.TimeLLM.Model` looks at its window; the rest
  shows when a model is loaded and `choose_path` tries both ways.
- The backbone's own modules are left alone: the fast path runs a *twin* of them, other modules around the same tensors.

    prefix.py     FastPath, its trial, and the cache of the prompt's keys and values
    decoder.py    the twin, and the modules that stand in its layers for those of transformers
    attention.py  attention over a frozen prefix; attention with dropout over the text prototypes
    linear.py     products with a matrix that is not trained
"""

from layers.fast.attention import cross_attention
from layers.fast.prefix import FastPath, LanguageModel, choose_path

__all__ = ["FastPath", "LanguageModel", "choose_path", "cross_attention"]
