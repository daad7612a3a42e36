// Runs before Gradio: names of buttons, language and theme as the user has chosen them, and what the browser keeps of a conversation.
const page = (() => {
  const LANGUAGE = document.documentElement.lang;
  const KEPT = "page-kept-1"; // another number when the kept values change their order or form
  const THEME = "page-theme";
  const BUTTONS = { "#message .submit-button": "{{send}}", "#message .stop-button": "{{stop}}" };
  let restored = false; // before that the parts of the page hold what they are made with

  for (const [name, value] of [["language", LANGUAGE], ["languages", [LANGUAGE]]]) {
    Object.defineProperty(navigator, name, { get: () => value });
  }

  const isDark = () => (localStorage.getItem(THEME) ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const showTheme = () => {
    if (document.body.classList.contains("dark") !== isDark()) document.body.classList.toggle("dark");
  };
  addEventListener("DOMContentLoaded", () => {
    new MutationObserver(showTheme).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    showTheme();
    new MutationObserver(nameButtons).observe(document.body, { childList: true, subtree: true });
  });
  // Gradio draws them anew each time, with an icon alone.
  const nameButtons = () => {
    for (const [selector, name] of Object.entries(BUTTONS)) {
      const button = document.querySelector(selector);
      if (button && button.title !== name) {
        button.title = name;
        button.setAttribute("aria-label", name);
      }
    }
  };

  return {
    switchLanguage() {
      const other = LANGUAGE === "en" ? "zh-CN" : "en";
      document.cookie = `page_language=${other}; path=/; max-age=31536000; samesite=strict`;
      location.reload();
    },
    switchTheme() {
      localStorage.setItem(THEME, isDark() ? "light" : "dark");
      showTheme();
    },
    // A tab goes on with its own conversation, a new tab with the last one.
    keep(values) {
      if (!restored) return;
      for (const storage of [sessionStorage, localStorage]) {
        try {
          storage.setItem(KEPT, JSON.stringify(values));
        } catch {} // the storage is full: the page works on without
      }
    },
    begin() {
      restored = true;
    },
    isReady: () => restored,
    kept(values) {
      try {
        const found = JSON.parse(sessionStorage.getItem(KEPT) ?? localStorage.getItem(KEPT));
        return Array.isArray(found) && found.length === values.length ? found : values;
      } catch {
        return values;
      }
    },
  };
})();
