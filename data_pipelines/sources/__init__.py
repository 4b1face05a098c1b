"""Sources: other people's layouts of media and text, read as drafts of samples.

jsonl          JSON Lines in our own form
llamafactory   LLaMA-Factory's multimodal sharegpt
ms_swift       ms-swift's standard format
hf_datasets    a dataset saved with `save_to_disk`
folder         media with texts beside them
"""
