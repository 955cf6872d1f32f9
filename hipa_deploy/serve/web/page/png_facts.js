// The parameters that the service writes into its PNG files: a text chunk `hipa` with JSON.

const KEYWORD = "hipa";
const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

/**
 * The parameters of a PNG as an object; null if it has none. The seed is a string of digits,
 * because it may have more of them than a number of JavaScript holds.
 */
export async function readFacts(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (SIGNATURE.some((value, at) => bytes[at] !== value)) return null;
  const view = new DataView(bytes.buffer);
  let at = SIGNATURE.length;
  while (at + 12 <= bytes.length) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const text = kind === "iTXt" ? readText(bytes.subarray(at + 8, at + 8 + length)) : null;
    if (text !== null) return parse(text);
    at += 12 + length;
  }
  return null;
}

/**
 * The order that made an image, as the history has it; null if no model here makes the same.
 *
 * `made` has the hashes of bundle and UNet of each model, as the parameters of its images have them.
 */
export function orderOf(facts, models, made) {
  const model = models.find(({ id }) => {
    const hashes = made[id];
    return hashes && hashes.bundle === facts.bundle && hashes.unet === facts.unet;
  });
  if (!model) return null;
  const { prompt, seed, strength, feather, match, scale } = facts;
  const order = { task: model.task, model: model.id, prompt, seed, strength, feather, match, scale };
  if (model.task === "upscale") return order; // its size is that of the enlarged image
  return { ...order, width: facts.width, height: facts.height };
}

/** Keyword, 0, compressed?, method, language, 0, translated keyword, 0, text in UTF-8. */
function readText(chunk) {
  const decode = (part) => new TextDecoder().decode(part);
  const end = chunk.indexOf(0);
  if (decode(chunk.subarray(0, end)) !== KEYWORD || chunk[end + 1] !== 0) return null;
  const language = chunk.indexOf(0, end + 3);
  const translated = chunk.indexOf(0, language + 1);
  return decode(chunk.subarray(translated + 1));
}

function parse(text) {
  try {
    const facts = JSON.parse(text.replace(/"seed":\s*(\d+)/, '"seed": "$1"'));
    return typeof facts === "object" ? facts : null;
  } catch {
    return null;
  }
}
