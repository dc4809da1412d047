"""A miniature Molmo2 that really points: a synthetic world, its questions, training from scratch, and scores.

`world` draws images and clips, `questions` asks and answers, `layout` has the sizes of the model, `tokenizer` its
vocabulary, `native` the format of the original trainer; `batches`, `dense_heads` and `train` train it, `evaluate`
scores it.
"""
