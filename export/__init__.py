if __name__ == "export":
    raise ImportError("import hipa_deploy.export, not export")
