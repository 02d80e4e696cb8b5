/** Keeps results: in the browser's database with what was asked for, and in PNG files with the same inside.
 *
 * Knows files and IndexedDB; does not know the page or the server.
 */

export const MOST_ITEMS = 300; // the oldest go
const KEYWORD = "parameters"; // of the PNG text, which other tools read too

/** The results so far, newest first, each {id, created, kind, blob, settings, index, edit, seconds}. */
export class Shelf {
  items = [];
  isKept = true;

  /** Read what earlier visits have left. Without a database (private windows) results last as long as the page. */
  async open() {
    try {
      this.database = await new Promise((resolve, reject) => {
        const request = indexedDB.open("nar", 1);
        request.onupgradeneeded = () => request.result.createObjectStore("items", { keyPath: "id" });
        request.onsuccess = () => resolve(request.result);
        request.onerror = () => reject(request.error);
      });
      const items = await this.#done(this.#store("readonly").getAll());
      this.items = items.sort((first, second) => second.created - first.created);
    } catch {
      this.isKept = false;
    }
  }

  async add(item) {
    this.items.unshift(item);
    for (const old of this.items.slice(MOST_ITEMS)) await this.remove(old);
    await this.#write((store) => store.put(item));
  }

  async remove(item) {
    this.items = this.items.filter((other) => other !== item);
    await this.#write((store) => store.delete(item.id));
  }

  async clear() {
    this.items = [];
    await this.#write((store) => store.clear());
  }

  #store(mode) {
    return this.database.transaction("items", mode).objectStore("items");
  }

  /** A full disk loses the item for the next visit, and no more. */
  async #write(change) {
    if (!this.isKept) return;
    try {
      await this.#done(change(this.#store("readwrite")));
    } catch {
      this.isKept = false;
    }
  }

  #done(request) {
    return new Promise((resolve, reject) => {
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  }
}

/** A blob from base64; `fetch` of a data URL is closed by the page's policy. */
export function fromBase64(text, type) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type });
}

/** A PNG file with the settings in a tEXt chunk, as JSON in ASCII, right behind the header. */
export async function withSettings(blob, settings) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const ascii = JSON.stringify(settings).replace(/[^\x20-\x7e]/g, (letter) =>
    `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const body = new TextEncoder().encode(`tEXt${KEYWORD}\0${ascii}`);
  const chunk = new DataView(new ArrayBuffer(body.length + 8));
  chunk.setUint32(0, body.length - 4);
  new Uint8Array(chunk.buffer).set(body, 4);
  chunk.setUint32(body.length + 4, crc(body));
  const header = 33; // signature and IHDR
  return new Blob([bytes.subarray(0, header), chunk.buffer, bytes.subarray(header)], { type: "image/png" });
}

/** The settings in a PNG file; null where there are none. */
export async function settingsIn(blob) {
  const view = new DataView(await blob.arrayBuffer());
  if (view.byteLength < 8 || view.getUint32(0) !== 0x89504e47) return null;
  const prefix = `tEXt${KEYWORD}\0`;
  for (let place = 8; place + 12 <= view.byteLength;) {
    const length = view.getUint32(place);
    if (place + 12 + length > view.byteLength) return null;
    const text = new TextDecoder("latin1").decode(new Uint8Array(view.buffer, place + 4, length + 4));
    if (text.startsWith(prefix)) {
      try {
        return JSON.parse(text.slice(prefix.length));
      } catch {
        return null; // another program's text
      }
    }
    place += 12 + length;
  }
  return null;
}

/** PNG's checksum, bit by bit: a chunk has some hundred bytes. */
function crc(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}
