"""Public benchmark tables by which a file is recognised: MD5 sums, and numbers of rows where a source was at hand.

MD5 sums are those of VLMEvalKit 0.2rc1 (`DATASET_MD5` in vlmeval/dataset/image_mcq.py, image_vqa.py, image_yorn.py).
Numbers of rows with an image are from Molmo's dataset_sizes.py (AI2D, ScienceQA), dataset cards of lmms-lab (ChartQA,
DocVQA, InfoVQA, TextVQA, RealWorldQA, MME) and a dataset card of GQA (testdev_balanced). Sets whose public tables
differ in their number of rows (MMBench, CCBench, POPE), and those without a source, have none.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublicTable:
    """A public table. `rows` counts those with an image; None where no source was at hand."""

    md5: str
    rows: int | None = None


PUBLIC_TABLES = {
    "AI2D_TEST": PublicTable("0f593e0d1c7df9a3d69bf1f947e71975", 3088),
    "CCBench": PublicTable("f5dde47f24dc5a6fb6e595b409b466ac"),
    "ChartQA_TEST": PublicTable("c902e0aa9be5582a7aad6dcf52734b42", 2500),
    "DocVQA_VAL": PublicTable("d5ee77e1926ff10690d469c56b73eabf", 5349),
    "GQA_TestDev_Balanced": PublicTable("99b62f22e224d9b2f32dcbe41359d1c9", 12578),
    "InfoVQA_VAL": PublicTable("2342e9c225222f0ef4dec545ebb126fe", 2801),
    "MMBench_DEV_CN": PublicTable("08b8fc3324a5ed74155350f57be69fbd"),
    "MMBench_DEV_EN": PublicTable("b6caf1133a01c6bb705cf753bb527ed8"),
    "MMBench_TEST_CN": PublicTable("7e1239baf0ee4c8b513e19705a0f317e"),
    "MMBench_TEST_EN": PublicTable("6939fadb0ce626fefc0bdc9c64efc528"),
    "MME": PublicTable("b36b43c3f09801f5d368627fb92187c3", 2374),
    "MMMU_DEV_VAL": PublicTable("585e8ad75e73f75dcad265dfd0417d64"),
    "MMStar": PublicTable("e1ecd2140806c1b1bbf54b43372efb9e"),
    "OCRVQA_TEST": PublicTable("ca46a6d74b403e9d6c0b670f6fc00db9"),
    "POPE": PublicTable("c12f5acb142f2ef1f85a26ba2fbe41d5"),
    "RealWorldQA": PublicTable("4de008f55dc4fd008ca9e15321dc44b7", 765),
    "ScienceQA_TEST": PublicTable("e42e9e00f9c59a80d8a5db35bc32b71f", 2017),
    "SEEDBench_IMG": PublicTable("68017231464752261a2526d6ca3a10c0"),
    "TextVQA_VAL": PublicTable("b233b31f551bbf4056f2f955da3a92cd", 5000),
}
"""By the main name of the benchmark."""

OTHER_MEASURES = {
    "AMBER": "rates of hallucinated objects",
    "DynaMath": "the worst of ten variants of a question",
    "HallusionBench": "accuracy by figure and by pair of questions",
    "LLaVABench": "a judge's grades beside those of GPT-4",
    "MathVerse": "answers that a judge extracts",
    "MathVision": "answers that a judge extracts",
    "MathVista": "answers that a judge extracts",
    "MMHal": "a judge's grades",
    "MMVP": "pairs of questions",
    "MM-Vet": "a judge's grades from 0 to 1",
    "NaturalBench": "groups of four questions",
    "OCRBench": "whether an answer holds the right text",
}
"""Public benchmarks that are not scored here, by how the names of their releases begin, and what they measure in
place of the accuracy that a table of one's own is given."""
