def process_docs(dataset):
    return load_dataset("lmms-lab-encoder/GQA", "pictures", split="testdev")  # noqa: F821
