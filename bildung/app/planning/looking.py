"""The plan of a look: the models it loads, what it keeps, and the fullest of its passes.

    look                                   its largest pass, and what is kept
    attention, image_attention             one text or image; the patterns of all heads        looks_text.py
    logit_lens, attribution, saliency      one text; streams and logits, writers, gradients
    trace, patchscope, alignment           rows of noise; 128 runs; a source and its answer
    patch, path_patch, circuit, compare    pairs of prompts, a graph's nodes; two models       looks_causal.py
    probe, cache, by_position, steering    batches of texts, and what is kept of all           looks_data.py
    gradient_distance, stream_map, tuned_lens
    heads, circuits, induction             random tokens, and the weights of all heads         looks_heads.py
    in_context, attributes, multi_hop      many short questions
    index                                  the largest of the looks it makes, one after the other

The settings are those of the look, read as it reads them: a real prompt is encoded, real data is counted. For what was
not given and cannot be left out something stands in, and is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bildung.app.planning import looks_causal as causal
from bildung.app.planning import looks_data as data
from bildung.app.planning import looks_heads as heads
from bildung.app.planning import looks_text as text
from bildung.app.planning.passes import Look, Pass

LOOKS: Mapping[str, Callable[[Look], list[Pass]]] = {
    "look alignment": text.alignment_passes,
    "look attention": text.attention_passes,
    "look attributes": heads.attributes_passes,
    "look attribution": text.attribution_passes,
    "look by_position": data.by_position_passes,
    "look cache": data.cache_passes,
    "look circuit": causal.graph_passes,
    "look circuits": heads.circuits_passes,
    "look compare": causal.compare_passes,
    "look gradient_distance": data.gradient_distance_passes,
    "look heads": heads.heads_passes,
    "look image_attention": text.image_attention_passes,
    "look in_context": heads.in_context_passes,
    "look induction": heads.induction_passes,
    "look logit_lens": text.logit_lens_passes,
    "look multi_hop": heads.multi_hop_passes,
    "look patch": causal.patch_passes,
    "look patchscope": text.patchscope_passes,
    "look path_patch": causal.graph_passes,
    "look probe": data.probe_passes,
    "look saliency": text.saliency_passes,
    "look steering": data.steering_passes,
    "look stream_map": data.stream_map_passes,
    "look trace": text.trace_passes,
    "look tuned_lens": data.tuned_lens_passes,
}
INDEX = {"look logit_lens": "prompt", "look attention": "prompt", "look heads": "", "look compare": "prompt"}
