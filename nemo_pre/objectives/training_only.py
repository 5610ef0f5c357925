"""What training adds to the model and inference drops, by the names of its parameters: the one list by which the
optimizer, resuming and export know it."""

TRAINED = ("pre_heads.", "laver_head.", "laver_mask_token")  # at optim.lr_heads
AVERAGED = ("ema_projection.", "laver_teacher.")
TRAINING_ONLY = (*TRAINED, *AVERAGED)
# Of LaVer's teacher the head stands for the rest, which has the names and shapes of the language model's layers.
COMPARED_ON_RESUME = (*TRAINED, "ema_projection.", "laver_teacher.head.", "laver_teacher.center")
