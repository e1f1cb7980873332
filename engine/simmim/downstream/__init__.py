"""What people do with a pre-trained encoder: fine-tune, probe, predict, describe, hand on."""
