# An uncertainty for each event: the length of the head's vector is the kappa of a von Mises-Fisher law. Behind a fine-tuning config.
direction_loss = "angular+vmf"
