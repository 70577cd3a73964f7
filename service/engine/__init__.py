"""From an admitted request to detections.

The walk of one JPEG, POST /v1/detect:

1. `http.middleware`: key and rate limit; `Admission.check` refuses before the body is read.
2. `http.routes.detect.DetectRoute`: query, body and deadline become one `DetectRequest`.
3. `detection.detect` reads the image's header (`pipeline.look_at`), and `Pipeline.decoding` tells
   what its kind and size will cost.
4. `Admission.promise` lets it in, if `Prediction.forecast` says that it will be done in time.
5. `Pipeline.detect` puts it into the queue of the decode threads (`batch_queue.BatchQueue`).
6. `Pipeline._decode`, in such a thread: `imaging.decode.prepare` decodes it onto its canvas.
7. `BatchQueue` again: batches of one model, canvas and IoU threshold; `inference.run_batch` runs
   one on a device, in the thread that decoded or in one of the device's own.
8. `postprocessing.select`: score filter, classes, cut, boxes in pixels of the original image.
9. `inference.deliver` wakes the event loop, and the route answers.

Tiles (`tiling`) and drawing (`drawing`) are more work of the same request, in the
same threads: `Pipeline.run`.
"""
