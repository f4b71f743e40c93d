"""The plan of a conversion, made from config.json and file headers alone: no tensor is read."""
