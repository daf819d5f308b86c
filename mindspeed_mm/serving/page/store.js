// Conversations in the browser's own database, images included.
function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let opened = null;

async function table(mode) {
  if (opened === null) {
    const request = indexedDB.open("mindspeed-mm", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("talks", { keyPath: "id" });
    opened = settled(request);
  }
  return (await opened).transaction("talks", mode).objectStore("talks");
}

export const loadTalks = async () =>
  (await settled((await table("readonly")).getAll())).sort((one, other) => other.changed - one.changed);
export const keepTalk = async (talk) => settled((await table("readwrite")).put(talk));
export const dropTalk = async (id) => settled((await table("readwrite")).delete(id));
