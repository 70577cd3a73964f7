"""RetinaNet in small pure modules: anchors, box coding, matching, backbones, FPN, heads, model."""
