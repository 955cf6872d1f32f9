"""HiPA training: teacher pairs, adaptor, losses, loop, evaluation (needs the ``train`` extra)."""

if __name__ == "train":
    raise ImportError("import hipa_deploy.train, not train")
