// The dialog that asks for an API key.

const byId = (id) => document.getElementById(id);

/** Ask for a key; resolves to it, or to null if the user would rather not. */
export function askForKey(words) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  const note = byId("key-words");
  note.textContent = words || "It is kept until you close this tab.";
  input.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let key = null;
    const submit = (event) => {
      event.preventDefault();
      const text = input.value.trim();
      // A header holds nothing else, and the service accepts no other keys.
      if (!/^[\x21-\x7e]+$/.test(text)) {
        note.textContent = "A key has plain letters, digits and signs, without blanks.";
        return;
      }
      key = text;
      dialog.close();
    };
    const cancel = () => dialog.close();
    const form = byId("key-form");
    form.addEventListener("submit", submit);
    byId("key-cancel").addEventListener("click", cancel);
    // Esc closes a dialog too.
    dialog.addEventListener("close", () => {
      form.removeEventListener("submit", submit);
      byId("key-cancel").removeEventListener("click", cancel);
      input.value = "";
      resolve(key);
    }, { once: true });
  });
}
