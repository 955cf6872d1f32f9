if __name__ == "engines":
    raise ImportError("import hipa_deploy.engines, not engines")
