"""Models that lmms-eval finds through ``LMMS_EVAL_PLUGINS=nemo_pre.evaluation``: by module, the class in it."""

AVAILABLE_MODELS = {"exported_vlm": "ExportedVLM"}
