"""From a record of a LLaVA data file to a batch of tensors: tokenizer, templates and masks, images, loader."""
