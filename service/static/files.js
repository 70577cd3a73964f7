// Files from a drop or a paste, and from folders with their subfolders.

const IMAGE = /\.(jpe?g|png|webp)$/i;
const MOST = 1000;

/** {images: [{file, name}], left: how many more there were}; a name in a folder has its path. */
export async function imagesOf(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  // All before the first await: the browser empties the list when the event is over.
  const entries = items.map((item) => {
    const entry = item.webkitGetAsEntry?.();
    return entry?.isDirectory ? entry : item.getAsFile();
  });
  const found = [];
  for (const entry of entries.filter(Boolean)) {
    // Files picked one by one are sent whatever their name: the service judges by content.
    if (entry instanceof File) found.push({ file: entry, name: entry.name });
    else for await (const image of below(entry)) found.push(image);
  }
  return { images: found.slice(0, MOST), left: Math.max(0, found.length - MOST) };
}

async function* below(folder) {
  for (const entry of await children(folder)) {
    if (entry.name.startsWith(".")) continue;
    if (entry.isDirectory) yield* below(entry);
    else if (IMAGE.test(entry.name)) {
      const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
      if (file) yield { file, name: entry.fullPath.replace(/^\//, "") };
    }
  }
}

async function children(folder) {
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    // Browsers hand over a hundred at a time, and none at the end.
    const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!some.length) break;
    found.push(...some);
  }
  return found.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
}
