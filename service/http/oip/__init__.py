"""The Open Inference Protocol v2: one data plane, spoken over REST and over gRPC."""
