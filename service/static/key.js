// The API key, and the dialog that asks for one. It is kept in sessionStorage: a reload keeps it,
// closing the tab drops it, and unlike a cookie it is not sent automatically.

const $ = (id) => document.getElementById(id);
const PLACE = `retinaserve-key ${new URL(".", document.baseURI).pathname}`;

let key = stored();
let wanted = false;
let asking = null;
let entered = () => {};

function stored() {
  try {
    return sessionStorage.getItem(PLACE);
  } catch {
    return null; // The browser forbids it to keep anything; then it is kept until a reload.
  }
}

function use(text) {
  key = text;
  try {
    if (text === null) sessionStorage.removeItem(PLACE);
    else sessionStorage.setItem(PLACE, text);
  } catch {
    // As in `stored`.
  }
  renderButton();
}

export const currentKey = () => key;

/** The headers of authentication. */
export const keyHeaders = () => (key === null ? {} : { "X-API-Key": key });

/** Run an action that may need a key; ask for keys until it succeeds or the dialog is cancelled. */
export async function unlocked(action) {
  for (let wasAsked = false; ; wasAsked = true) {
    const used = key;
    try {
      const result = await action();
      if (wasAsked) entered();
      return result;
    } catch (problem) {
      if (problem.status !== 401) throw problem;
      wanted = true;
      // Another request may have got a valid key in the meantime.
      if (key !== used) continue;
      use(null);
      if (!(await ask(used !== null))) throw problem;
    }
  }
}

/** Ask for a key in one dialog for all callers; return whether there is one now. */
function ask(wasRefused) {
  if (asking) return asking;
  say(wasRefused ? "The service does not accept this key. It may be mistyped, or revoked." : "");
  $("key").value = "";
  $("key-dialog").returnValue = ""; // What Escape leaves as it is.
  $("key-dialog").showModal();
  $("key").focus();
  asking = new Promise((resolve) => {
    $("key-dialog").addEventListener("close", () => resolve($("key-dialog").returnValue === "use"), {
      once: true,
    });
  }).finally(() => {
    asking = null;
    $("key").value = "";
  });
  return asking;
}

function say(text) {
  $("key-error").textContent = text;
  $("key").setAttribute("aria-invalid", String(text !== ""));
}

function renderButton() {
  $("key-button").hidden = !wanted && key === null;
  $("key-button").textContent = key === null ? "Enter key" : "Forget key";
}

/** `entered` is called once there is another key, `forgotten` after one was dropped. */
export function wireKey(hooks) {
  entered = hooks.entered;
  renderButton();
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("key").value.trim();
    // A header cannot hold other characters, and the request would fail without a reason.
    if (!/^[\x21-\x7e]+$/.test(text)) {
      $("key").select();
      return say("This is not a key: keys have ASCII letters, digits and signs, without spaces.");
    }
    use(text);
    $("key-dialog").close("use");
  });
  $("key-cancel").addEventListener("click", () => $("key-dialog").close("cancel"));
  $("key-button").addEventListener("click", async () => {
    if (key !== null) {
      use(null);
      hooks.forgotten();
    } else if (await ask(false)) entered();
  });
}
