// A user's image file made ready for the service.

const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp"]; // what the service reads
const MOST_BYTES = 4 * 1024 * 1024; // of a file that goes over the network at every keystroke
const FINER = 2; // an image goes there with up to so many pixels for each one of the model, a side

/**
 * The image to send for a task.
 *
 * To enlarge, a file stays as it is. To edit, repaint or follow it, it is cut to the model's shape about its
 * centre and reduced, because it is sent again at every keystroke; one that fits stays as it is. So
 * the picture on the page is exactly what the service sees, and a mask has its pixels.
 *
 * `target` is {width, height} of the result. Returns {blob, width, height, note}.
 */
export async function prepare(file, task, target, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright, as its EXIF data say
  } catch {
    throw new Error("This file cannot be read as an image. Expected PNG, JPEG, WebP or another format that this browser shows.");
  }
  try {
    return await ready(bitmap, file, task, target, limits);
  } finally {
    bitmap.close();
  }
}

async function ready(bitmap, file, task, target, limits) {
  const { width, height } = bitmap;
  const known = SENT_AS_IS.includes(file.type);
  if (task === "upscale") {
    if (width * height > limits.pixels) {
      throw new Error(`The image has ${width} × ${height} pixels. This service takes at most ${limits.pixels} in all.`);
    }
    const blob = known ? file : await draw(bitmap, { x: 0, y: 0, width, height }, { width, height });
    // The form around the file takes some bytes too.
    if (blob.size > limits.body - 20_000) {
      throw new Error(`The file has ${blob.size} bytes. This service takes at most ${limits.body} in a request.`);
    }
    return { blob, width, height, note: `${width} × ${height} pixels` };
  }

  const crop = centre(width, height, target);
  // One row or column is not worth a cut; the service scales it away.
  const uncut = width - crop.width <= 1 && height - crop.height <= 1;
  const small = width <= FINER * target.width && file.size <= Math.min(MOST_BYTES, limits.body - 20_000);
  if (uncut && small && known) return { blob: file, width, height, note: `${width} × ${height} pixels` };

  const factor = Math.min(1, (FINER * target.width) / crop.width, (FINER * target.height) / crop.height);
  const size = {
    width: Math.max(1, Math.round(crop.width * factor)),
    height: Math.max(1, Math.round(crop.height * factor)),
  };
  const blob = await draw(bitmap, crop, size);
  const done = [];
  if (!uncut) done.push("cut to its centre");
  if (factor < 1) done.push("reduced");
  const after = `${size.width} × ${size.height}`;
  const note = done.length ? `${width} × ${height} pixels, ${done.join(" and ")}: ${after}` : `${after} pixels`;
  return { blob, ...size, note };
}

/** The largest part about the centre with the shape of the result. */
function centre(width, height, target) {
  const cutWidth = Math.min(width, Math.max(1, Math.round((height * target.width) / target.height)));
  const cutHeight = Math.min(height, Math.max(1, Math.round((width * target.height) / target.width)));
  return {
    x: Math.floor((width - cutWidth) / 2),
    y: Math.floor((height - cutHeight) / 2),
    width: cutWidth,
    height: cutHeight,
  };
}

async function draw(bitmap, part, size) {
  const canvas = new OffscreenCanvas(size.width, size.height);
  const pen = canvas.getContext("2d");
  // What is transparent becomes white, as the service would have it.
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, size.width, size.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, part.x, part.y, part.width, part.height, 0, 0, size.width, size.height);
  return canvas.convertToBlob({ type: "image/png" });
}
