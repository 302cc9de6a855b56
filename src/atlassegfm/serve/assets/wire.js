// Requests to the server, and voxels as bytes.

const base = new URL(".", location.href);

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function send(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(new URL(`api/${path}`, base), options);
  } catch {
    throw new Refused(0, "the server does not answer; is it still running?");
  }
  if (answer.ok) return answer;
  let detail = answer.statusText;
  try {
    const content = (await answer.json()).detail;
    detail = typeof content === "string" ? content : "the server cannot use this request";
  } catch { /* no JSON: the status says it */ }
  throw new Refused(answer.status, detail);
}

export const call = async (path, body) => (await send(path, body)).json();
export const bytes = async (path, body) => new Uint8Array(await (await send(path, body)).arrayBuffer());

const through = async (content, stream) =>
  new Uint8Array(await new Response(new Blob([content]).stream().pipeThrough(stream)).arrayBuffer());
export const inflate = (content) => through(content, new DecompressionStream("deflate"));
const deflate = (content) => through(content, new CompressionStream("deflate"));

export const fromBase64 = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));

function toBase64(content) {
  let text = "";
  for (let at = 0; at < content.length; at += 32768) text += String.fromCharCode(...content.subarray(at, at + 32768));
  return btoa(text);
}

// Structure numbers have one byte, or two where there are many.
export const numbersOf = (content, size) => (size === 1 ? content : new Uint16Array(content.buffer));

// Voxels, as places in the array of a scan of this shape, as a box with a compressed mask.
export async function packed(places, shape) {
  const [nx, ny] = shape;
  const low = [Infinity, Infinity, Infinity], high = [-1, -1, -1];
  const split = (place) => [place % nx, Math.floor(place / nx) % ny, Math.floor(place / (nx * ny))];
  for (const place of places) {
    split(place).forEach((n, axis) => {
      if (n < low[axis]) low[axis] = n;
      if (n > high[axis]) high[axis] = n;
    });
  }
  const size = high.map((n, axis) => n - low[axis] + 1);
  const mask = new Uint8Array(size[0] * size[1] * size[2]);
  for (const place of places) {
    const [i, j, k] = split(place);
    mask[i - low[0] + size[0] * (j - low[1] + size[1] * (k - low[2]))] = 1;
  }
  return { start: low, shape: size, mask: toBase64(await deflate(mask)) };
}

// Put the numbers of a box into those of a scan of this shape.
export async function paste(labels, shape, changed, size) {
  const numbers = numbersOf(await inflate(fromBase64(changed.data)), size);
  const [i, j, k] = changed.start, [a, b, c] = changed.shape;
  for (let z = 0; z < c; z++) {
    for (let y = 0; y < b; y++) {
      const from = a * (y + b * z);
      labels.set(numbers.subarray(from, from + a), i + shape[0] * (j + y + shape[1] * (k + z)));
    }
  }
}
