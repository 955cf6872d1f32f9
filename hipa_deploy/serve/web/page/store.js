// Kept images in the browser's IndexedDB; in memory where the browser has none for this page.

const NAME = "hipa-history";
const TABLE = "images";

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class Store {
  /** Open the store; a private window may refuse, and then nothing is kept beyond this page. */
  static async open() {
    const store = new Store();
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      store.base = await promised(request);
    } catch {
      store.base = null;
    }
    return store;
  }

  /** All entries, oldest first. */
  async all() {
    return this.base ? promised(this.#table("readonly").getAll()) : [];
  }

  async put(entry) {
    if (this.base) await promised(this.#table("readwrite").put(entry));
  }

  async remove(id) {
    if (this.base) await promised(this.#table("readwrite").delete(id));
  }

  async clear() {
    if (this.base) await promised(this.#table("readwrite").clear());
  }

  #table(mode) {
    return this.base.transaction(TABLE, mode).objectStore(TABLE);
  }
}
