"""The Brown corpus's part-of-speech tags, 472 as they stand in the files, as twelve coarse classes.

    vbd-hl  ->  vbd  ->  VERB        headline, title, cited: -hl, -tl, -nc
    ppss+ber, bez*, nn$  ->  PRON, VERB, NOUN        the first of two words, without its negation or its 's

The names are those of Petrov, Das & McDonald 2012 (arXiv 1104.2086), A universal part-of-speech tagset. The table is
our own: foreign words (fw-) are X, conjunctions that open a clause (cs) ADP, determiners before a noun DET.
"""

from __future__ import annotations

import re

from bildung.data.rows import Unusable

CLASSES = {
    "NOUN": "nn nns np nps nr nrs pn",
    "VERB": "vb vbd vbg vbn vbz md be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz",
    "ADJ": "jj jjr jjs jjt ap od",
    "ADV": "rb rbr rbt rn ql qlp wql wrb *",
    "PRON": "ppl ppls ppo pps ppss pp$$ wpo wps ex",
    "DET": "at dt dti dts dtx abl abn abx pp$ wdt wp$",
    "ADP": "in cs",
    "CONJ": "cc",
    "NUM": "cd",
    "PRT": "rp to",
    "PUNCT": ". , : ; ( ) -- `` '' '",
    "X": "uh nil",
}
CLASS_OF = {tag: name for name, tags in CLASSES.items() for tag in tags.split()}


def coarse(tag: str) -> str:
    """The class of a tag as it stands in the corpus. Raises Unusable for one that Brown does not have."""
    given = tag.lower()
    if given.startswith("fw-"):
        return "X"
    first = re.sub(r"(-(tl|hl|nc|t|n))+$", "", given.split("+")[0])
    for form in (first, first.rstrip("*"), first.rstrip("*").rstrip("$")):
        if form in CLASS_OF:
            return CLASS_OF[form]
    raise Unusable(f"{tag!r} is no tag of the Brown corpus")
