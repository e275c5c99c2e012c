"""The encoder: the only place that knows Hugging Face attribute names.

Models are Hugging Face `*ForSequenceClassification` instances of the families bert (MiniLM too), electra,
distilbert, roberta (XLM-R too), modernbert and mobilebert. Layers, heads and units are counted from 0 here.
"""
