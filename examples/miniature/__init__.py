"""A miniature Molmo2 that really points: a synthetic world, its questions, training from scratch, and scores.

`world` draws, `questions` asks and answers, `layout` says how large the model is, `tokenizer` writes its vocabulary,
`native` keeps it in the trainer's form, `batches` and `dense_heads` and `train` teach it, `evaluate` scores it.
"""
