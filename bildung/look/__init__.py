"""Insight: what happens inside a model, and what an operation changed there.

The files of this folder are the looks, one per `bildung look VERB`; what they compute is in the folders below it:

    lenses/           logit lens, tuned lens, where two models part
    probing/          activations of a data set, probes, control tasks, selectivity
    patchscopes/      a vector of one run read by another run; maps between models; facts
    attention_heads/  QK and OV, composition, what heads do
    causal/           activation patching, causal tracing, path patching, ablation, pairs of prompts
    graph/            edges, EAP, ACDC, circuits and how faithful they are
    contributions/    direct logit attribution, saliency
    comparing/        CKA, change of weights, two models as one result
    pages/            the pages and pictures that a look leaves
"""
