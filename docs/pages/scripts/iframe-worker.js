// Browsers refuse web workers on pages that are opened from the disk. There the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.document.open();
      inside.document.close();
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inside.document.createElement("script");
      this.loaded = new Promise((resolve) => script.addEventListener("load", resolve));
      this.postMessage = async (data) => {
        await this.loaded;
        inside.dispatchEvent(new MessageEvent("message", { data }));
      };
      script.src = url;
      inside.document.documentElement.append(script);
    }
  };
}
